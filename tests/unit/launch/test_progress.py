"""What a run says of how far it is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tinylmm.launch.progress import _look, _Shown, describe

TRAINING = {"time": 100.0, "step": 20, "steps": 620}
PASS = {"time": 100.0, "done": 1000, "of": "images", "share": 0.1}


@pytest.mark.parametrize(
    ("first", "row", "expected"),
    [
        (TRAINING, TRAINING, "step 20/620"),
        (
            TRAINING,
            {"time": 110.0, "step": 120, "steps": 620, "loss": 1.2345, "samples_per_s": 412.4},
            "step 120/620  loss 1.234  412 samples/s  ETA 0:50",
        ),
        ({"time": 0.0, "step": 1}, {"time": 9.0, "step": 5}, "step 5"),
        (PASS, PASS, "1,000 images  10%"),
        (PASS, PASS | {"time": 120.0, "done": 5000, "share": 0.5}, "5,000 images  50%  200/s  ETA 0:25"),
        (PASS, PASS | {"time": 120.0, "done": 5000}, "5,000 images  10%  200/s"),
    ],
    ids=["training, first row", "training", "no end known", "pass, first row", "pass", "reader has not moved"],
)
def test_a_row_says_how_much_is_done_how_fast_and_when_all_will_be(
    first: dict[str, Any], row: dict[str, Any], expected: str
) -> None:
    assert describe(row, first) == expected


def test_the_pace_of_a_resumed_training_leaves_out_the_time_in_which_nothing_ran(tmp_path: Path) -> None:
    now = time.time()
    path = tmp_path / "metrics.jsonl"
    shown = _Shown("train", path, time.monotonic(), now)
    for row, eta in (
        ({"step": 10, "steps": 100, "time": now - 3600}, False),
        ({"step": 11, "steps": 100, "time": now + 10}, False),
        ({"step": 21, "steps": 100, "time": now + 20}, True),
    ):
        path.write_text(json.dumps(row) + "\n")
        _look(shown)
        assert ("ETA" in shown.said) == eta
    assert "ETA 1:19" in shown.said
