"""What a launch leaves open is chosen so that the plan has room for it, the fastest first; what is given stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tinylmm.config.compose import compose_run, run_name
from tinylmm.planning import choose
from tinylmm.planning.choose import LONGEST, MARGIN, STEP, choices, fit_of, settled
from tinylmm.planning.estimate import Training
from tinylmm.planning.estimates import settled_settings, training_of
from tinylmm.planning.planner import RunPlan, plan_run
from tinylmm.store.stage import Stage

BIG = ("llm=phi2", "vt=siglip", "eval=none", "launch.cache_features=false")


@pytest.fixture(autouse=True)
def _deepspeed_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether this machine has it is not what is tested; nor its GPU, or what was measured of it."""
    monkeypatch.setattr(choose, "find_spec", lambda name: object())
    monkeypatch.setattr("tinylmm.planning.estimate.gpu_names", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def planned(tmp_path: Path, *words: str, stage: str = "finetune") -> tuple[RunPlan, Stage]:
    run = compose_run([f"store={tmp_path / 'store'}", *words])
    plan = plan_run(run, run_name(run))
    return plan, next(one for one in plan.graph if one.kind == "train" and one.name == stage)


def training(tmp_path: Path, *words: str, stage: str = "finetune") -> Training:
    return training_of(*planned(tmp_path, *words, stage=stage))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["launch.gpu=h200"], {"row_tokens": 20480, "gradient_checkpointing": False}),
        (["launch.gpu=h100"], {"row_tokens": 7168, "gradient_checkpointing": False}),
        (
            ["launch.gpu=h200", "launch=torchrun", "launch.nproc=8"],
            {"deepspeed_stage": None, "row_tokens": 20480, "gradient_checkpointing": False},
        ),
        (
            ["launch.gpu=h100", "launch=torchrun", "launch.nproc=8"],
            {"deepspeed_stage": 2, "row_tokens": 20480, "gradient_checkpointing": False},
        ),
        (["launch.gpu=h100", "launch.row_tokens=9000"], {"gradient_checkpointing": True}),
        (["launch.gpu=h200", "launch.gradient_checkpointing=true"], {"row_tokens": 20480}),
        (["launch.gpu=h200", "launch.micro_batch=4"], {"gradient_checkpointing": False}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_open_is_chosen_and_what_is_given_stays(
    tmp_path: Path, words: list[str], expected: dict[str, Any]
) -> None:
    assert choices(training(tmp_path, *BIG, *words)) == expected


@pytest.mark.parametrize("gpu", ["h100", "a100_80", "a100_40", "l40s", "rtx4090"])
def test_the_row_is_the_longest_that_leaves_the_margin(tmp_path: Path, gpu: str) -> None:
    found = training(tmp_path, *BIG, f"launch.gpu={gpu}", stage="pretrain")
    assert found.positions is not None and found.device.card is not None
    assert found.positions % STEP == 0 and found.positions <= LONGEST
    room = (1 - MARGIN) * found.device.card.memory_bytes
    assert fit_of(found).memory.total <= room
    longer = training(
        tmp_path, *BIG, f"launch.gpu={gpu}", f"launch.row_tokens={found.positions + STEP}", stage="pretrain"
    )
    assert found.positions == LONGEST or longer.launch.checkpoints or fit_of(longer).memory.total > room


def test_without_deepspeed_nothing_is_shared_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    found = training(tmp_path, *BIG, "launch.gpu=h100", "launch=torchrun", "launch.nproc=8")
    assert found.launch.sharding is None and fit_of(found).label == "ddp x8"


def test_a_cpu_takes_what_its_caches_hold_whatever_memory_it_has(tmp_path: Path) -> None:
    found = training(tmp_path, "eval=none")
    assert choices(found) == {"row_tokens": 1024, "gradient_checkpointing": False}
    assert settled(found).launch == found.launch


def test_where_nothing_fits_the_least_is_taken(tmp_path: Path) -> None:
    found = training(tmp_path, *BIG, "launch.gpu=rtx3090")
    assert choices(found) == {"row_tokens": STEP, "gradient_checkpointing": True} and not fit_of(found).fits


def test_a_stage_is_given_the_choice_and_its_digest_stays(tmp_path: Path) -> None:
    plan, stage = planned(tmp_path, *BIG, "launch.gpu=h200")
    launch = settled_settings(plan, stage)["launch"]
    assert (launch["row_tokens"], launch["gradient_checkpointing"]) == (20480, False)
    assert planned(tmp_path, *BIG, "launch.gpu=h100")[1].digest == stage.digest
    other = next(one for one in plan.graph if one.kind == "prepare")
    assert settled_settings(plan, other) == other.settings


def test_parts_that_nobody_knows_leave_the_launch_as_it_is(tmp_path: Path) -> None:
    plan, stage = planned(tmp_path, "llm=hf", "llm.pretrained=org/name", "vt=siglip", "eval=none")
    assert settled_settings(plan, stage) == stage.settings
