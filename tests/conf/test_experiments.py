"""Every shipped study is planned, asks for what its paper did, and says so."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tinylmm.config.compose import compose_all
from tinylmm.config.spec import RunSpec
from tinylmm.planning.planner import RunPlan, plan_record, plan_runs
from tinylmm.reports.published import published_for

FOLDER = Path(__file__).parents[2] / "experiments"
STUDIES = {
    "paper_table_a1": (12, 30, 24),
    "paper_connectors": (2, 4, 4),
    "paper_data": (6, 12, 12),
    "paper_recipes": (6, 15, 15),
    "paper": (16, 38, 32),
    "factory_table_1": (10, 21, 20),
    "openelm_card": (1, 2, 2),
    "nano_paper": (39, 90, 66),
    "nano_video": (15, 30, 30),
    "tinyllava_video": (4, 8, 8),
}
"""Study -> runs, trainings asked for, distinct ones."""


@cache
def planned(study: str) -> tuple[RunPlan, ...]:
    plans = []
    for _, plan in plan_runs(compose_all([f"experiment={study}"], multirun=False)):
        assert isinstance(plan, RunPlan), plan
        plans.append(plan)
    return tuple(plans)


def parts(run: RunSpec) -> tuple[str, str, str, str]:
    return run.llm.name, run.vision_tower.name, run.connector.name, run.recipe.name


def readme(study: str) -> str:
    return (FOLDER / study / "README.md").read_text(encoding="utf-8")


def test_every_folder_is_a_study_that_is_tested_here() -> None:
    assert sorted(path.name for path in FOLDER.iterdir() if path.is_dir()) == sorted(STUDIES)


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_asks_for_what_it_says(study: str) -> None:
    totals = plan_record(planned(study))["totals"]
    assert (totals["runs"], totals["asked"]["train"], totals["distinct"]["train"]) == STUDIES[study]
    row = next(line for line in (FOLDER / "README.md").read_text().splitlines() if f"[{study}]" in line)
    assert tuple(map(int, re.findall(r"\| (\d+) (?=\|)", row))) == STUDIES[study]


@pytest.mark.parametrize("study", STUDIES)
def test_a_readme_has_question_commands_and_published_result(study: str) -> None:
    text = readme(study)
    assert text.startswith("# ") and "**Question.**" in text
    assert f"\ntinylmm-train experiment={study}" in text and f"\ntinylmm plan experiment={study}" in text
    assert "**Published**" in text


@pytest.mark.parametrize(
    ("study", "source"),
    [
        ("paper_table_a1", "Table A1"),
        ("factory_table_1", "Factory, Table 1"),
        ("openelm_card", "model card of jiajunlong"),
    ],
)
def test_every_published_figure_of_a_readme_is_that_of_its_run(study: str, source: str) -> None:
    rows = {line for line in readme(study).splitlines() if re.match(r"\| .*\d\.\d", line)}
    assert len(rows) == len(planned(study))
    for plan in planned(study):
        llm, tower, connector, recipe = parts(plan.run)
        values = [one.value for one in published_for(llm, tower, recipe, connector=connector) if source in one.source]
        assert len(values) >= 7
        cells = [set(map(float, re.findall(r"\| (?=([\d.]+) \|)", row))) for row in rows]
        assert any(set(values) == numbers for numbers in cells), (parts(plan.run), values)


def test_the_paper_trains_all_that_its_studies_do_and_nothing_else() -> None:
    def trained(study: str) -> set[str]:
        return {stage.digest for plan in planned(study) for stage in plan.graph if stage.kind == "train"}

    whole = set().union(*map(trained, ("paper_table_a1", "paper_connectors", "paper_data", "paper_recipes")))
    assert trained("paper") == whole
    assert trained("openelm_card") < trained("factory_table_1")


def test_the_factorys_siglip_has_728_tokens_and_the_papers_729() -> None:
    def dropped(study: str) -> set[tuple[str, bool]]:
        return {(plan.run.vision_tower.name, plan.run.vision_tower.drop_first_token) for plan in planned(study)}

    assert dropped("factory_table_1") == {("clip", False), ("siglip", True)}
    assert dropped("paper") == {("clip", False), ("siglip", False)}


def test_figures_7_and_8_differ_in_one_thing_each() -> None:
    def sources(study: str, recipe: str) -> list[Any]:
        runs = [plan.run for plan in planned(study) if plan.run.recipe.name == recipe and plan.run.llm.name == "phi2"]
        (run,) = runs
        return [
            run.data.sources[stage.data].annotations
            for stage in run.recipe.stages.values()
            if isinstance(stage.data, str)
        ]

    llava, share = sources("paper_data", "bench"), sources("paper_data", "bench_sharegpt4v")
    assert [Path(name).name.split("_")[0] for name in llava] == ["blip", "llava"]
    assert [Path(name).name.split("_")[0] for name in share] == ["share-captioner", "sharegpt4v"]
    assert sources("paper_recipes", "bench_sharegpt4v") == share
    assert sources("paper_recipes", "share_bench") == [llava[0], *share]


def test_nano_paper_asks_the_papers_questions_on_what_every_machine_has() -> None:
    runs = [plan.run for plan in planned("nano_paper")]
    assert {run.llm.name for run in runs} == {run.vision_tower.name for run in runs} == {"nano", "nano_small"}
    assert {run.connector.name for run in runs} == {"linear", "mlp"}
    assert {run.recipe.name for run in runs} == {"base", "share", "lora"}
    assert {run.seed for run in runs} == {0, 1, 2}
    assert {run.data.name for run in runs} == {"digits"}
    assert all(not plan.missing and not plan.not_found for plan in planned("nano_paper"))


def test_the_command_line_takes_a_part_of_a_study() -> None:
    runs = compose_all(["experiment=paper_table_a1", "llm=phi2", "seed=0"], multirun=False)
    assert [parts(run) for _, run in runs] == [
        ("phi2", tower, "mlp", recipe) for tower in ("clip", "siglip") for recipe in ("bench", "share_bench")
    ]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_study_is_yaml_of_a_page(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_" and lines[1].startswith("# ") and len(lines) < 40
    assert yaml.safe_load(path.read_text(encoding="utf-8"))
