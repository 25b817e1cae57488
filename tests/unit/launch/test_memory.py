"""A training that runs out of memory ends with what the plan predicted of it, and with a change that fits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tinylmm.config.compose import compose_run, run_name
from tinylmm.errors import StageFailedError, TinyLMMError, UserError
from tinylmm.launch.memory import OUT_OF_MEMORY, with_advice
from tinylmm.planning.planner import RunPlan, plan_run
from tinylmm.store.stage import Stage

CUDA = "train finetune failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 1.20 GiB."
RANK = "rank 1 ended first: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."
CPU = "train finetune failed with RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."


def planned(store: Path, *words: str) -> RunPlan:
    run = compose_run([f"store={store}", "eval=none", *words])
    return plan_run(run, run_name(run))


def training(plan: RunPlan, name: str = "finetune") -> Stage:
    return next(stage for stage in plan.graph if stage.kind == "train" and stage.name == name)


@pytest.mark.parametrize("said", [CUDA, RANK, CPU], ids=["local", "a rank", "cpu"])
def test_an_error_of_memory_ends_with_the_prediction_and_what_fits(tmp_path: Path, said: str) -> None:
    words = ("launch.gpu=rtx4090", "launch.row_tokens=12288", "launch.gradient_checkpointing=false")
    plan = planned(tmp_path, "llm=phi2", "vt=siglip", *words)
    failure = with_advice(StageFailedError(said), plan, training(plan, "pretrain"))
    assert isinstance(failure, StageFailedError)
    first, last = str(failure).rsplit("\n", 1)
    assert first == said
    assert "tinylmm plan predicts 29.3 GiB of 22.4 GiB for local x1" in last
    assert "(weights 6.0 GiB, gradients 36.3 MiB, optimizer" in last
    assert "launch.row_tokens=6144 fits" in last


def test_where_it_should_have_fitted_less_is_advised(tmp_path: Path) -> None:
    plan = planned(tmp_path, "llm=phi2", "vt=siglip", "launch.gpu=h200")
    said = str(with_advice(StageFailedError(CUDA), plan, training(plan, "pretrain")))
    assert said.endswith(
        "Set launch.row_tokens=10240 or launch.gradient_checkpointing=true, and give the same command again."
    )


def test_of_parts_that_nobody_knows_there_is_no_figure(tmp_path: Path) -> None:
    plan = planned(tmp_path, "llm=hf", "llm.pretrained=org/name", "vt=siglip")
    assert "Set launch.micro_batch=8" in str(with_advice(StageFailedError(CUDA), plan, training(plan)))


@pytest.mark.parametrize("failure", [StageFailedError("the loss is a list"), UserError(CUDA)], ids=["other", "users"])
def test_another_failure_stays_as_it_is(tmp_path: Path, failure: TinyLMMError) -> None:
    plan = planned(tmp_path)
    assert with_advice(failure, plan, training(plan)) is failure


def test_the_words_of_torchs_own_allocator_are_known(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    plan = planned(tmp_path)
    failure = StageFailedError(f"train finetune failed with {type(raised.value).__name__}: {raised.value}")
    assert "tinylmm plan predicts" in str(with_advice(failure, plan, training(plan)))
    assert issubclass(torch.OutOfMemoryError, RuntimeError) and torch.OutOfMemoryError.__name__ in OUT_OF_MEMORY
