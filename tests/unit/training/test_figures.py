"""Live figures of real tiny trainings: what they count, what they cost, where they go, and that they change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.builders import record, tiny_loaded
from tests.integration.project import Project, tiny_project
from tinylmm.config.compose import compose_all
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.data.collate import Collator
from tinylmm.launch.progress import describe
from tinylmm.planning.estimates import training_of
from tinylmm.planning.planner import RunPlan, plan_runs
from tinylmm.reports.collect import collect_report
from tinylmm.reports.html import render_html
from tinylmm.reports.tables import render_markdown
from tinylmm.sizing.cards import Calibration, card_named, save_calibration, sheet_flops
from tinylmm.sizing.parameters import total_parameters
from tinylmm.stages import train
from tinylmm.training.cost import Cost, Peak, parts_of
from tinylmm.training.figures import COUNTS, Counted
from tinylmm.training.trainer import LMMTrainer

MEASURED = 1e9
ALWAYS = {
    "samples_per_s", "tokens_per_s", "text_tokens_per_s", "image_tokens_per_s", "supervised_tokens_per_s", "data_wait",
    "padding", "samples_per_row", "peak_memory_gib",
}  # fmt: skip
ONE_STAGE = ("recipe.stages.finetune.max_steps=1",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A finished run on a machine that was measured, with every tracker on."""
    root = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        for name in ("WANDB_LOG_MODEL", "WANDB_WATCH", "WANDB_SILENT"):
            patch.setenv(name, "")  # so that what the run sets is taken back
        patch.setenv("WANDB_MODE", "offline")
        save_calibration(Calibration("cpu", 1e9, MEASURED, MEASURED, 1e9, 100.0))
        project = tiny_project(root)
        done = project.train_here(*ONE_STAGE, "tracking.tensorboard=true", "tracking.wandb.enabled=true")
        assert done.returncode == 0, done.stderr
        yield project


def stage(project: Project, name: str) -> Path:
    return project.model(name).parents[1]


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_have_every_figure_that_is_known(trained: Project) -> None:
    first, *others = rows(stage(trained, "pretrain"))
    assert first.keys() >= ALWAYS and "eta_s" not in first
    for row in others:
        assert row.keys() >= ALWAYS | {"eta_s", "peak_share"} and row["device"] == "cpu, fp32"
        assert "mfu" not in row, "no data sheet says what this CPU does"
        assert row["text_tokens_per_s"] + row["image_tokens_per_s"] == pytest.approx(row["tokens_per_s"], abs=0.1)
        assert 0 < row["supervised_tokens_per_s"] <= row["text_tokens_per_s"], "a caption is learnt whole"
        assert 0 <= row["padding"] < 1 and 0 <= row["data_wait"] <= 1 and row["peak_memory_gib"] > 0.05
        assert row["run_eta_s"] > row["eta_s"], "a finetuning follows, which the planner can reckon"
    assert others[-1]["eta_s"] == 0


def test_flops_are_those_that_the_planner_counts(trained: Project) -> None:
    """Every step of the stage took eight samples, so the mean over its steps is that of a sample."""
    found = [row["peak_share"] * MEASURED / row["samples_per_s"] for row in rows(stage(trained, "pretrain"))]
    words = [*trained.words, *ONE_STAGE, f"store={trained.store}"]
    ((_, plan),) = plan_runs(compose_all(words, False))
    assert isinstance(plan, RunPlan)
    planned = training_of(plan, next(s for s in plan.graph if s.name == "pretrain"))
    assert planned.lengths.read
    assert mean(found) == pytest.approx(sum(flops.total for flops in planned.flops().values()), rel=0.01)


def test_every_tracker_has_them(trained: Project) -> None:
    events = EventAccumulator(str(stage(trained, "pretrain") / "output/tensorboard"))
    events.Reload()
    assert {f"train/{name}" for name in ALWAYS | {"peak_share", "eta_s"}} <= set(events.Tags()["scalars"])
    runs = [path.read_bytes() for path in (trained.store / "tracking/wandb").glob("offline-run-*/*.wandb")]
    assert any(b"train/supervised_tokens_per_s" in content and b"train/data_wait" in content for content in runs)


def test_the_report_says_how_fast_a_training_was(trained: Project) -> None:
    report = collect_report(trained.store)
    for page in (render_html(report), render_markdown(report)):
        for words in ("tokens/s (", " of the measured peak (cpu, fp32)", "waited for data", "GiB peak memory"):
            assert words in page


def test_the_progress_line_says_it_while_it_runs() -> None:
    row = {"time": 20.0, "step": 3, "steps": 5, "loss": 1.0, "samples_per_s": 58.2, "tokens_per_s": 51234.5}
    row |= {
        "device": "NVIDIA H200 SXM, bf16",
        "mfu": 0.41,
        "peak_share": 0.52,
        "data_wait": 0.014,
        "padding": 0.021,
        "peak_memory_gib": 61.34,
    }
    assert describe(row, row | {"time": 10.0, "step": 1}) == (
        "step 3/5  loss 1.000  58 samples/s  51,234 tokens/s  MFU 41%  52% of the measured peak  "
        "(NVIDIA H200 SXM, bf16)  waits for data 1%  padding 2%  61.3 GiB  ETA 0:10"
    )


def test_counting_changes_no_bit_of_what_is_learnt(
    trained: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plain(figures: object, collate: Counted, **others: Any) -> Any:
        trainer: Any = LMMTrainer(collate=collate.collate, **others)
        trainer.figures = figures
        return trainer

    monkeypatch.setattr(train, "MeasuredTrainer", plain)
    project = tiny_project(tmp_path)
    assert project.train_here(*ONE_STAGE).returncode == 0
    for path in trained.model("pretrain").rglob("*.safetensors"):
        expected = load_file(project.model("pretrain") / path.relative_to(trained.model("pretrain")))
        assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_travels_with_what_is_in_it(packing: bool) -> None:
    samples = [record("a", [1, IMAGE_TOKEN_ID, 5, 6], 2, ("x",)), record("b", [7, 8, 9], 1), record("c", [3] * 30, 4)]
    collate = Collator(4, 0, 64, packing, lambda name: torch.zeros(3, 4, 4), max_length=20)
    batch = Counted(collate, 4, 20)(samples)
    counts = batch[COUNTS]
    assert (counts.samples, counts.tokens, counts.squared) == (3, 7 + 3 + 20, 49 + 9 + 400)
    assert (counts.image_tokens, counts.views) == (4, 1)
    assert counts.supervised == 2 + 1 + 0, "the cut takes what the long one had to learn"
    assert counts.positions == batch["input_ids"].numel() == (32 if packing else 3 * 24)


def test_parts_of_a_built_model_are_counted_exactly() -> None:
    loaded = tiny_loaded()
    parts = parts_of(loaded)
    assert parts is not None
    for name, part in parts.items():
        module = getattr(loaded.model, name)
        assert total_parameters(part) == sum(parameter.numel() for parameter in module.parameters()), name


def test_mfu_is_of_the_cards_data_sheet() -> None:
    card = card_named("NVIDIA H200")
    assert card is not None
    peak = Peak(2 * sheet_flops(card, 2), None, "NVIDIA H200 SXM, bf16")
    assert peak.sheet == pytest.approx(2 * 989e12)
    cost = Cost(parts_of(tiny_loaded()), {"vision_tower": "frozen", "connector": "full", "llm": "full"}, True, peak)
    flops = cost.flops(8, 800, 80_000, 100, 8)
    assert flops is not None and cost.shares(8, 800, 80_000, 100, 8) == {"mfu": pytest.approx(flops / (2 * 989e12))}
