"""The speed benchmark runs at toy size, and what it compares says the same."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.eval import main


def test_the_benchmark_of_the_engine_compares_equal_answers(tmp_path: Path) -> None:
    out = tmp_path / "eval.json"
    words = ["--images", "3", "--questions", "4", "--baseline", "5", "--width", "128", "--layers", "1", "--size", "28"]
    assert main([*words, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["answers_equal"] is True and record["ratio"] > 0
    assert (record["questions"], record["images_encoded"], record["image_tokens"]) == (12, 3, 4)
