"""Training checkpoints: published whole, damaged ones refused by name, older ones rotated last."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tinylmm.errors import UserError
from tinylmm.training.checkpoints import CheckpointFolder, Ranks
from tinylmm.training.metrics import MetricsFile
from tinylmm.training.state import Form

ONE, TWO, ZERO = Ranks(1, None), Ranks(2, None), Ranks(2, 3)

FILES = ("state-00001-of-00001.safetensors", "optimizer.json", "scheduler.pt", "rng_state.pth", "trainer_state.json")


def folder(tmp_path: Path, digest: str = "d1", ranks: Ranks = ONE) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", 2, digest, ranks, MetricsFile(tmp_path / "metrics.jsonl"))


def save(checkpoints: CheckpointFolder, step: int, form: Form = "by name") -> Path:
    checkpoints.clear_staging(step)
    for name in FILES:
        (checkpoints.staged(step) / name).write_bytes(f"{name} of step {step}".encode() * 50)
    return checkpoints.publish(step, form)


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
    checkpoints.clear_staging(20)
    assert checkpoints.newest_valid() == tmp_path / "checkpoints/checkpoint-10"


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(folder(tmp_path), 10)
    assert folder(tmp_path, "d2").newest_valid() is None
    assert "written with another digest" in caplog.text


@pytest.mark.parametrize(
    ("form", "writer", "reader", "fine"),
    [
        ("by name", TWO, ONE, True),
        ("by name", ZERO, ONE, True),
        ("by name", ONE, ZERO, True),
        ("replicated", TWO, ONE, True),
        ("replicated", ONE, TWO, True),
        ("replicated", TWO, ZERO, False),
        ("partitioned", ZERO, ZERO, True),
        ("partitioned", ZERO, Ranks(4, 3), False),
        ("partitioned", ZERO, Ranks(2, 2), False),
        ("partitioned", ZERO, TWO, False),
    ],
)
def test_another_launch_continues_where_the_form_allows_and_is_else_refused_before_anything_is_touched(
    form: Form, writer: Ranks, reader: Ranks, fine: bool, tmp_path: Path
) -> None:
    path = save(folder(tmp_path, ranks=writer), 10, form)
    if fine:
        assert folder(tmp_path, ranks=reader).newest_valid() == path
        return
    with pytest.raises(UserError, match=f"Continue with {writer.words()}, or delete"):
        folder(tmp_path, ranks=reader).newest_valid()
    assert path.exists()


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_progress_rows_go_on_without_a_hole_whatever_happened_to_them(tmp_path: Path, damage: str) -> None:
    checkpoints = folder(tmp_path)
    for step in (10, 20, 30):
        checkpoints.rows.append(step=step, loss=1 / step)
        if step == 20:
            path = save(checkpoints, step)
    rows = tmp_path / "metrics.jsonl"
    content = bytearray(rows.read_bytes())
    whole = bytes(content)
    content[5] ^= 4
    rows.write_bytes(bytes(content) if damage == "flip" else whole[:-9])
    checkpoints.forget_after(path)
    assert rows.read_bytes() == b"".join(line + b"\n" for line in whole.split(b"\n")[:2])
    checkpoints.forget_after(None)
    assert rows.read_bytes() == b""
