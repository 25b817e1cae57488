"""The table of fast paths has every switch that there is."""

from __future__ import annotations

from typing import Any

import pytest

from tinylmm.config.launch import LaunchSpec
from tinylmm.config.trainer import TrainerSpec
from tinylmm.verification.paths import NO_ARITHMETIC, PATHS, Here, all_off

FIELDS = {f"launch.{name}" for name in LaunchSpec.model_fields} | {f"trainer.{n}" for n in TrainerSpec.model_fields}
HERE: dict[str, Any] = {
    "device": "cpu", "gpus": 0, "precision": "fp32", "samples": 8, "configured": {}, "frozen_tower": True
}  # fmt: skip


def test_every_field_of_launch_and_trainer_is_a_path_or_known_to_be_none() -> None:
    named = {name for path in PATHS for name in (*path.on, *path.off)}
    assert named | NO_ARITHMETIC == FIELDS, "a new switch is a row in verification/paths.py"
    assert not named & NO_ARITHMETIC


def test_a_path_says_what_turns_it_off_again() -> None:
    for path in PATHS:
        assert set(path.on) <= set(path.off), path.name
        assert any(path.on[name] != path.off[name] for name in path.on), path.name
    assert len({path.name for path in PATHS}) == len(PATHS)
    assert all(all_off()[name] == value for path in PATHS for name, value in path.off.items()), "rows contradict"


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        ("attention: flash_attention_2", {}, "there is none"),
        ("attention: flash_attention_2", {"device": "cuda", "gpus": 1}, "fp32"),
        ("ranks", {"device": "cuda", "gpus": 1}, "two GPUs"),
        ("ranks", {}, ""),
        ("feature cache", {"frozen_tower": False}, "is trained"),
        ("compile", {}, "compiles nothing"),
        ("compile", {"configured": {"trainer.torch_compile": True}}, ""),
        ("packing", {"samples": 1}, "one sample"),
        ("positions of a row", {"samples": 1}, "one sample"),
        ("positions of a row", {}, ""),
        ("micro-batch", {}, ""),
    ],
)
def test_a_path_that_cannot_run_says_why(path: str, changes: dict[str, Any], said: str) -> None:
    reason = next(one for one in PATHS if one.name == path).blocked(Here(**HERE | changes))
    assert said in reason and bool(reason) == bool(said)
