"""Published figures: as printed, with source and unit, found by parts and shown beside one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.reports.conftest import SPEC, StoreBuilder, digest_of, write
from tinylmm.evaluation.benchmarks.registry import benchmark_names
from tinylmm.reports.collect import collect_report
from tinylmm.reports.html import render_html
from tinylmm.reports.published import published_for, published_grid, published_results
from tinylmm.reports.tables import render_markdown


@pytest.mark.parametrize(
    ("parts", "benchmark", "expected"),
    [
        # TinyLLaVA, Table A1, last row; Table 3 and the model card repeat it; Factory, Table 1, last row
        (("phi2", "siglip", "share"), "vqav2", [79.9, 79.9, 79.9, 80.1]),
        (("phi2", "siglip", "share"), "llava_bench", [75.8, 75.8, 75.8]),
        (("phi2", "siglip", "share"), "mme", [1464.9, 1464.9, 1466.4]),
        (("phi2", "siglip", "share_factory"), "mmmu", [38.4]),
        (("tinyllama", "clip", "base"), "gqa", [58.1, 58.0]),
        (("tinyllama", "clip", "bench"), "gqa", [58.1]),
        (("phi2", "siglip", "share_bench"), "vqav2", [79.9, 79.9, 79.9]),
        (("tinyllama", "siglip", "share"), "sqa", [60.1, 60.3]),  # table and card disagree
        (("stablelm2", "clip", "share"), "pope", [85.4]),
        (("openelm_450m", "siglip", "base"), "vqav2", [71.74, 71.7]),
        (("qwen2_5_3b", "siglip", "base"), "mmmu", [39.9]),
        (("phi2", "siglip", "lora"), "pope", [87.9]),
        (("phi2", "siglip", "qlora"), "gqa", []),
        (("phi2", "dinov2", "base"), None, []),
    ],
)
def test_figures_are_found_by_parts_and_recipe(
    parts: tuple[str, str, str], benchmark: str | None, expected: list[float]
) -> None:
    assert [figure.value for figure in published_for(*parts, benchmark=benchmark)] == expected


def test_another_connector_has_no_published_figures() -> None:
    assert published_for("phi2", "siglip", "share", connector="linear") == []


def test_a_figure_says_its_unit_and_which_of_ours_it_is() -> None:
    by_source = {f.source.split(",")[-1].strip(): f for f in published_for("phi2", "siglip", "base", "pope")}
    assert by_source["Table 1"].metric == "accuracy"  # TinyLLaVA Factory
    assert by_source["Table A1"].metric is None  # the paper does not say
    assert "does not say" in by_source["Table A1"].unit
    llava = [f for f in published_results() if f.model == "LLaVA-1.5-7B" and f.benchmark == "pope"]
    assert [(f.value, f.metric) for f in llava] == [(85.9, "f1")]


def test_every_figure_is_whole() -> None:
    figures = published_results()
    # Table 3, row by row, dashes left out: IDEFICS, InstructBLIP, LLaVA-1.5, Qwen-VL, MoE-LLaVA twice, LLaVA-Phi, ...
    table_3 = 4 + 6 + 9 + 5 + 8 + 8 + 7 + 6 + 9 + 9
    cards = 3 * 8 + 7
    assert (
        len(figures) == 12 * 7 + table_3 + cards + 10 * 8 + 4 * 8 + 4 * 5
    )  # Table A1; Factory: table, README's rows; Video
    assert {f.benchmark for f in figures} <= set(benchmark_names())
    assert all(f.unit and f.source and f.model for f in figures)
    assert all((f.llm is None) == (not f.recipes) for f in figures)
    assert all(300 < f.value < 2000 if f.benchmark == "mme" else 10 < f.value < 100 for f in figures)


def gqa_store(store: StoreBuilder) -> StoreBuilder:
    store.stage("train", "finetune")
    parents = {"model": digest_of("finetune")}
    for benchmark, metrics in (("gqa", ["accuracy", "accuracy/open"]), ("pope", ["f1", "accuracy"])):
        folder = store.stage("eval", f"{benchmark}@finetune", {"source": {}}, parents=parents)
        rows = [
            {"metric": name, "value": 60.5 + n, "blind": None, "chance": None, "count": 9}
            for n, name in enumerate(metrics)
        ]
        write(folder / "output/scores.json", {"benchmark": benchmark, "protocol": "llava", "metrics": rows})
    path = store.run("phi2-run") / "run.json"
    record = json.loads(path.read_text())
    record["spec"] = SPEC | {"llm": {"name": "phi2", "init": "pretrained"}}
    write(path, record)
    return store


def test_reports_show_them_beside_our_own(store: StoreBuilder, tmp_path: Path) -> None:
    report = collect_report(gqa_store(store).root, ["phi2-run"])
    header, rows = published_grid(report.runs[0])
    assert header == ["benchmark", "published by", "unit", "ours", "published"]
    assert [(row[0], row[3], row[4]) for row in rows] == [
        ("gqa", "60.5", "61.3"),
        ("gqa", "60.5", "61.6"),
        ("pope", "60.5", "87.1"),  # not stated which: our headline
        ("pope", "61.5", "87.2"),  # accuracy: the Factory's
    ]
    for text in (render_markdown(report), render_html(report)):
        assert "Published" in text and "TinyLLaVA Factory, Table 1" in text and "87.2" in text


def test_a_run_without_published_figures_has_no_table(store: StoreBuilder) -> None:
    store.whole()
    report = collect_report(store.root)
    assert published_grid(report.runs[0])[1] == []
    assert "Published" not in render_markdown(report) + render_html(report)
