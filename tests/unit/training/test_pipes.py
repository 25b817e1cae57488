"""Readers need no shared memory where there is little of it, and the batches are the same."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from tests.integration.project import tiny_project
from tinylmm.config.launch import LaunchSpec
from tinylmm.training import pipes
from tinylmm.training.pipes import MOST_READERS, Packed, needs_pipes, num_readers, readahead, unpack

BATCH = {
    "ids": torch.arange(6).view(2, 3),
    "features": torch.randn(2, 3, 4, dtype=torch.bfloat16),
    "pixels": torch.randn(3, 4).t(),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5),
    "none": None,
    "names": ["a", "b"],
}


def batch(_: list[int]) -> dict[str, object]:
    return dict(BATCH)


def test_a_batch_comes_through_a_reader_as_it_was() -> None:
    loader = DataLoader([0], batch_size=1, collate_fn=Packed(batch), num_workers=1)
    (found,) = (unpack(packed) for packed in loader)
    assert found.keys() == BATCH.keys()
    for key, value in BATCH.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype and torch.equal(found[key], value), key
        else:
            assert found[key] == value


def test_small_shared_memory_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipes, "shared_memory_bytes", lambda: 64_000_000)
    with caplog.at_level(logging.WARNING):
        assert needs_pipes(2)
    assert "/dev/shm has 64 MB" in caplog.text and "--shm-size" in caplog.text
    assert not needs_pipes(0)
    monkeypatch.setattr(pipes, "shared_memory_bytes", lambda: 8_000_000_000)
    assert not needs_pipes(2)


def test_a_training_through_pipes_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for name, size in (("large", 8_000_000_000), ("small", 64_000)):
        monkeypatch.setattr(pipes, "shared_memory_bytes", lambda size=size: size)
        project = tiny_project(tmp_path / name)
        words = ("launch.num_workers=2", "recipe.stages.pretrain.max_steps=2", "recipe.stages.finetune.max_steps=2")
        done = project.train_here(*words, "launch.cache_features=false")
        assert done.returncode == 0, done.stderr
        weights.append(load_file(project.model("finetune") / "connector/model.safetensors"))
    for key, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][key])


@pytest.mark.parametrize(
    ("launch", "on_gpu", "cached", "expected"),
    [
        ({}, True, False, 12),
        ({"backend": "torchrun", "nproc": 4}, True, False, 3),
        ({"backend": "torchrun", "nproc": 16}, True, False, 1),
        ({}, False, False, 0),
        ({}, True, True, 0),
        ({"num_workers": 5}, False, True, 5),
        ({"num_workers": 0}, True, False, 0),
    ],
    ids=["a GPU", "four GPUs", "more GPUs than cores", "a CPU", "cached features", "as asked for", "none asked for"],
)
def test_a_rank_has_its_share_of_the_cores_to_read_with(
    launch: dict[str, object], on_gpu: bool, cached: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipes, "usable_cores", lambda: 12)
    assert num_readers(LaunchSpec.model_validate(launch), on_gpu, cached) == expected


def test_a_large_machine_gives_one_rank_no_more_readers_than_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "usable_cores", lambda: 256)
    assert num_readers(LaunchSpec(), on_gpu=True, cached=False) == MOST_READERS


def test_readers_have_the_next_steps_batches_ready() -> None:
    assert [readahead(workers, 8) for workers in (0, 1, 3, 16)] == [None, 16, 6, 2]
