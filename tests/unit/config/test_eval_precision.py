"""The precision of an evaluation that names none: by where the run will be, settled when it is composed, and in the digest."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.config.spec import RunSpec
from tinylmm.planning.graph import build_graph
from tinylmm.planning.planner import plan_run
from tinylmm.store.integrity import mark_complete, write_manifest
from tinylmm.store.stage import Stage
from tinylmm.store.store import Store

EVALUATION = "digits@finetune"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch


def with_gpus(machine: pytest.MonkeyPatch, number: int) -> None:
    machine.setattr("tinylmm.config.launch.visible_gpus", lambda: number)


def evaluation(run: RunSpec) -> Stage:
    return next(stage for stage in build_graph(run, NoFiles()) if stage.name == EVALUATION)


@pytest.mark.parametrize(
    ("gpus", "words", "expected"),
    [
        (0, [], "fp32"),
        (1, [], "bf16"),
        (4, ["launch.device=cpu"], "fp32"),
        (0, ["launch.device=cuda"], "bf16"),
        (0, ["launch=slurm"], "bf16"),
        (1, ["launch=slurm", "launch.device=cpu"], "fp32"),
        (1, ["eval.digits.precision=fp32"], "fp32"),
        (0, ["eval.digits.precision=fp16"], "fp16"),
        (0, ["launch.gpu=h100"], "fp32"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_auto_goes_by_where_the_launch_says_that_the_run_will_be(
    gpus: int, words: list[str], expected: str, machine: pytest.MonkeyPatch
) -> None:
    with_gpus(machine, gpus)
    run = compose_run(words)
    assert run.eval["digits"].precision == expected
    assert evaluation(run).spec["precision"] == expected, "what is hashed is the word that was chosen"


def test_what_was_chosen_is_one_evaluation_with_what_was_named(machine: pytest.MonkeyPatch) -> None:
    named = {word: evaluation(compose_run([f"eval.digits.precision={word}"])).digest for word in ("fp32", "bf16")}
    with_gpus(machine, 0)
    assert evaluation(compose_run([])).digest == named["fp32"]
    with_gpus(machine, 1)
    assert evaluation(compose_run([])).digest == named["bf16"] != named["fp32"]


def test_a_run_that_another_machine_goes_on_with_keeps_its_precision(machine: pytest.MonkeyPatch) -> None:
    for here, there in ((0, 1), (1, 0)):
        with_gpus(machine, here)
        run = compose_run([])
        with_gpus(machine, there)
        again = RunSpec.model_validate(run.model_dump(mode="json"))  # as a queued job reads it
        assert evaluation(again).digest == evaluation(run).digest


def test_a_plan_says_that_the_store_has_the_answers_in_another_precision(
    machine: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [f"store={tmp_path}"]
    with_gpus(machine, 1)
    before = plan_run(compose_run(words), "run", words)
    (done,) = (stage for stage in before.graph if stage.name == EVALUATION)
    publish(Store(tmp_path), done)
    assert not plan_run(compose_run(words), "run", words).warnings, "here they are used"
    with_gpus(machine, 0)
    (said,) = plan_run(compose_run(words), "run", words).warnings
    assert said.startswith(f"{EVALUATION}: the store has its answers in bf16, and this run asks in fp32")
    assert "eval.digits.precision=bf16" in said
    named = [*words, "eval.digits.precision=fp32"]
    assert not plan_run(compose_run(named), "run", named).warnings, "who names one means it"


def publish(store: Store, stage: Stage) -> None:
    """Let the store have a stage, as it is there when it is done."""
    folder = store.folder(stage)
    (folder / "output").mkdir(parents=True)
    write_manifest(folder, {"format": 1, "kind": stage.kind, "name": stage.name, "digest": stage.digest, "summary": {}})
    mark_complete(folder)
