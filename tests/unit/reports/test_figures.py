"""figures.py and the study's part of the page: drawn from real stores, whatever levels are called."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tinylmm.reports.collect import collect_report
from tinylmm.reports.effects import Findings, findings_of
from tinylmm.reports.figures import picture_pdf, picture_svg, study_pictures
from tinylmm.reports.html import render_html

from .conftest import StoreBuilder
from .sweeps import add_run, sweep
from .test_html import HOSTILE, Page


def findings_in(store: StoreBuilder, names: list[str]) -> Findings:
    found = findings_of(collect_report(store.root, names))
    assert found is not None
    return found


def page(store: StoreBuilder, names: list[str]) -> str:
    found = findings_in(store, names)
    return render_html(found.study.report, found)


def test_a_sweep_has_bars_by_factor_a_radar_of_categories_and_its_cost(store: StoreBuilder) -> None:
    found = findings_in(store, sweep(store))
    pictures = {picture.name: picture_svg(picture, picture.name) for picture in study_pictures(found)}
    assert list(pictures) == ["bars-llm", "bars-recipe", "radar", "cost"]
    assert {"small", "large", "base", "lora", "mean over all"} <= set(
        re.findall(r">([^<>]+)</text>", pictures["bars-llm"])
    )
    assert pictures["bars-llm"].count(">40.0</text>") == 3 and pictures["bars-llm"].count(">70.0</text>") == 3
    assert "multiple choice" in pictures["radar"] and "small · base" in pictures["radar"]
    assert ">1</text>" in pictures["cost"] and "training of one model in s" in pictures["cost"]
    assert "var(--muted)" in pictures["cost"] and "#010203" not in pictures["cost"]


def test_with_three_benchmarks_the_radar_is_over_them_and_bars_have_a_panel_each(store: StoreBuilder) -> None:
    names = sweep(store, seeds=2)
    for name in names:
        record = store.root / "runs" / name / "run.json"
        content = json.loads(record.read_text())
        (first,) = [stage for stage in content["stages"] if stage["kind"] == "eval"]
        source = store.root / "stages" / first["key"]
        for other in ("pope", "gqa"):
            key = f"{first['key']}-{other}"
            target = source.parent / key
            for file in ("spec.json", "manifest.json", "output/scores.json", "output/generations.jsonl"):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                (target / file).write_text((source / file).read_text())
            content["stages"].append(first | {"name": first["name"].replace("digits", other), "key": key})
        record.write_text(json.dumps(content))
    found = findings_in(store, names)
    pictures = {picture.name: picture_svg(picture, "x") for picture in study_pictures(found)}
    assert {column.title for column in found.study.columns} == {"digits accuracy", "pope accuracy", "gqa accuracy"}
    assert all(title in pictures["radar"] for title in ("digits accuracy", "pope accuracy", "gqa accuracy"))
    assert pictures["bars-llm"].count("mean over all") == 3


def test_a_figure_for_a_paper_is_a_pdf_and_the_same_every_time(store: StoreBuilder) -> None:
    found = findings_in(store, sweep(store, seeds=2))
    for picture in study_pictures(found):
        first = picture_pdf(picture)
        assert first.startswith(b"%PDF") and picture_pdf(picture) == first


def test_a_cells_runs_are_links_to_their_places_on_the_page(store: StoreBuilder) -> None:
    tags = Page(page(store, sweep(store))).tags
    ids = [attributes["id"] for _, attributes in tags if attributes.get("id")]
    links = [(attributes.get("href") or "") for tag, attributes in tags if tag == "a"]
    assert len(ids) == len(set(ids))
    assert len(links) == 12 and {link.removeprefix("#") for link in links} <= set(ids)


def test_the_page_of_a_sweep_loads_and_runs_nothing_whatever_levels_are_called(store: StoreBuilder) -> None:
    store.images()
    for name, level in (("one", HOSTILE), ("two", "$\\frac{1}{0}$ \u202egnp"), ("three", "手" * 80)):
        add_run(store, name, {"llm.name": level, "recipe.name": name}, 0.5)
    text = page(store, ["one", "two", "three"])
    tags = Page(text).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in tags)
    assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert "\u202e" not in text and "$\\frac" in text


def test_tables_of_the_page_come_in_the_order_of_questions(store: StoreBuilder) -> None:
    text = page(store, sweep(store))
    heads = re.findall(r"<h2>([^<]+)</h2>", text)
    assert heads[:3] == ["Cells", "Figures", "Seeds"]
    assert [head for head in heads if head in ("Main effects", "Interactions", "Cost")] == [
        "Main effects",
        "Interactions",
        "Cost",
    ]
    assert "12 runs by LLM and Recipe" in text


@pytest.mark.parametrize("cells", [1, 2])
def test_a_study_with_little_in_it_is_a_page_all_the_same(store: StoreBuilder, cells: int, tmp_path: Path) -> None:
    store.images()
    names = [f"run-{cell}-{seed}" for cell in range(cells) for seed in range(2)]
    for number, name in enumerate(names):
        _, cell, seed = name.split("-")
        add_run(store, name, {"seed": int(seed), "llm.name": f"llm-{cell}"}, 0.5, luck=number)
    found = findings_in(store, names)
    assert len(found.study.cells) == cells
    Page(render_html(found.study.report, found))


def test_runs_without_any_score_are_a_page_all_the_same(store: StoreBuilder) -> None:
    store.images()
    for name in ("one", "two"):
        add_run(store, name, {"llm.name": name}, 0.5, benchmarks=())
    found = findings_in(store, ["one", "two"])
    assert study_pictures(found) == []
    assert "has no scores" in render_html(found.study.report, found)
