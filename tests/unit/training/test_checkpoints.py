"""Training checkpoints: published whole, damaged ones refused by name, older ones rotated last."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tinylmm.training.checkpoints import CheckpointFolder

FILES = ("trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def folder(tmp_path: Path, digest: str = "d1") -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", 2, {"digest": digest})


def save(checkpoints: CheckpointFolder, step: int) -> Path:
    checkpoints.clear_staging()
    staged = checkpoints.staging() / f"checkpoint-{step}"
    staged.mkdir()
    for name in FILES:
        (staged / name).write_bytes(f"{name} of step {step}".encode() * 50)
    return checkpoints.publish(step)


def test_the_newest_is_found_and_two_are_kept(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    for step in (10, 20, 100):
        save(checkpoints, step)
    assert [step for step, _ in checkpoints.published()] == [20, 100]
    assert checkpoints.newest_valid() == tmp_path / "checkpoints/checkpoint-100"


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
@pytest.mark.parametrize("damage", ["flip", "delete", "truncate"])
def test_a_damaged_checkpoint_is_named_set_aside_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 10)
    path = save(checkpoints, 20) / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncate" else bytes([content[0] ^ 1]) + content[1:])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_valid() == tmp_path / "checkpoints/checkpoint-10"
    assert name in caplog.text
    assert (tmp_path / "checkpoints/refused-checkpoint-20").is_dir(), "nothing is deleted"


def test_an_unfinished_save_does_not_count(tmp_path: Path) -> None:
    checkpoints = folder(tmp_path)
    save(checkpoints, 10)
    checkpoints.clear_staging()
    (checkpoints.staging() / "checkpoint-20").mkdir()
    assert checkpoints.newest_valid() == tmp_path / "checkpoints/checkpoint-10"


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(folder(tmp_path), 10)
    assert folder(tmp_path, "d2").newest_valid() is None
    assert "written with another digest" in caplog.text
