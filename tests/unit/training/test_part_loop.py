"""A killed training ends with the weights of one that was not, and no damaged checkpoint is trusted."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tinylmm.errors import NonFiniteError, StoppedError
from tinylmm.stop import STOP_FILE, watch_for_stop
from tinylmm.store.layout import METRICS_FILE
from tinylmm.training.metrics import MetricsFile
from tinylmm.training.part_loop import CHECKPOINT_FILE, LoopSettings, learning_rate_factor, train_loop

SETTINGS = LoopSettings(steps=12, batch=4, lr=0.05, warmup_ratio=0.25, weight_decay=0.1, save_every_s=0.0, log_steps=2)


class Toy:
    """A network with dropout (so that the random state matters) and a loss that can fail at a step."""

    def __init__(self, fail_at: int | None = None, nan_at: int | None = None) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.fail_at, self.nan_at = fail_at, nan_at

    def loss(self, step: int) -> Tensor:
        if step == self.fail_at:
            raise RuntimeError("killed")
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss: Tensor = self.model(inputs).square().mean()
        return loss * float("nan") if step == self.nan_at else loss

    def train(self, folder: Path) -> list[Tensor]:
        folder.mkdir(parents=True, exist_ok=True)
        train_loop(self.model, self.loss, SETTINGS, folder, MetricsFile(folder / METRICS_FILE))
        return [parameter.detach().clone() for parameter in self.model.parameters()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return Toy().train(tmp_path_factory.mktemp("whole"))


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def steps_logged(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_a_broken_off_training_continues_to_the_same_weights(tmp_path: Path, uninterrupted: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        Toy(fail_at=7).train(tmp_path)
    assert same(Toy().train(tmp_path), uninterrupted)
    assert steps_logged(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_a_process_killed_by_sigkill_leaves_a_checkpoint_to_continue_from(
    tmp_path: Path, uninterrupted: list[Tensor]
) -> None:
    script = (
        "import os, signal, sys, pathlib, tests.unit.training.test_part_loop as t\n"
        "toy = t.Toy(); loss = toy.loss\n"
        "toy.loss = lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == 5 else loss(step)\n"
        "toy.train(pathlib.Path(sys.argv[1]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=Path(__file__).parents[3], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert same(Toy().train(tmp_path), uninterrupted)


def test_a_finished_training_is_not_done_again(tmp_path: Path, uninterrupted: list[Tensor]) -> None:
    Toy().train(tmp_path)
    assert same(Toy(fail_at=0).train(tmp_path), uninterrupted)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_training_starts_over(
    tmp_path: Path, uninterrupted: list[Tensor], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        Toy(fail_at=7).train(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-9], "flipped": flipped, "foreign": b"PK" + content, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert same(Toy().train(tmp_path), uninterrupted)
    assert "checkpoint refused" in caplog.text
    assert (path.parent / f"refused-1-{path.name}").exists()
    assert steps_logged(tmp_path) == [2, 4, 6, 8, 10, 12]


def test_a_half_written_checkpoint_does_not_replace_the_one_before(tmp_path: Path, uninterrupted: list[Tensor]) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        Toy(fail_at=7).train(tmp_path)
    path = tmp_path / CHECKPOINT_FILE
    path.with_name(f"{path.name}.tmp").write_bytes(b"half")
    assert same(Toy().train(tmp_path), uninterrupted)


def test_a_loss_that_is_no_number_stops_before_any_weight_is_touched(tmp_path: Path) -> None:
    toy = Toy(nan_at=4)
    with pytest.raises(NonFiniteError, match="step 5 of 12: loss nan"):
        toy.train(tmp_path)
    assert all(bool(parameter.isfinite().all()) for parameter in toy.model.parameters())


def test_a_stop_request_saves_and_the_next_try_continues(tmp_path: Path, uninterrupted: list[Tensor]) -> None:
    (tmp_path / STOP_FILE).touch()
    with watch_for_stop(tmp_path), pytest.raises(StoppedError, match="after step 1 of 12"):
        Toy().train(tmp_path)
    (tmp_path / STOP_FILE).unlink()
    assert same(Toy().train(tmp_path), uninterrupted)


def test_the_rate_rises_in_a_line_and_falls_in_a_cosine_to_zero() -> None:
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert factors[9] == 1.0
    assert factors[54] == pytest.approx(0.5)
    assert factors[99] == pytest.approx(0.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
