"""Two runs compared question by question: difference, how sure, and which answers flipped with their images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tinylmm.cli.report import report as command
from tinylmm.errors import UserError
from tinylmm.evaluation.statistics import mcnemar
from tinylmm.reports.collect import collect_report
from tinylmm.reports.compare import compare_runs
from tinylmm.reports.write import write_comparison

from .conftest import StoreBuilder

APP = typer.Typer()
APP.command()(command)


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "output/generations.jsonl").read_text().splitlines()]


@pytest.fixture
def two(store: StoreBuilder) -> StoreBuilder:
    """Run `a`, whose last model answers 8 of 10, and run `b`, whose only model answers 3 of 10."""
    store.whole("a")
    store.run("b", **{"digits@finetune": "todo"})
    return store


def test_the_difference_and_its_test_follow_from_the_flips(two: StoreBuilder) -> None:
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (pair.count, pair.unpaired, pair.stages) == (40, 0, ("finetune", "pretrain"))
    assert pair.means == (80.0, 30.0) and pair.difference == -50.0
    assert pair.wins == (20, 0) and pair.p_value == mcnemar(20, 0)
    assert pair.interval[0] < -50 < pair.interval[1] < 0
    assert "the second answered 0 better and 20 worse." in pair.verdict
    back = compare_runs(collect_report(two.root, ["b", "a"]))[0]
    assert back.difference == 50.0 and back.wins == (0, 20)


def test_the_page_shows_flipped_questions_with_their_images_and_nothing_from_outside(two: StoreBuilder) -> None:
    folder = two.root / "stages" / two.key("eval", "digits@pretrain")
    rows = rows_of(folder)
    rows[3] |= {"text": "<script>alert(1)</script>"}
    rows[4] |= {"image": "../../../../../spec.json"}
    (folder / "output/generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = collect_report(two.root, ["a", "b"])
    page, record = write_comparison(report, compare_runs(report))
    text = page.read_text()
    assert text.count("data:image/png;base64,") >= 15 and "<script" not in text
    assert "What colour is the digit?" in text and "first answered better" in text
    (saved,) = json.loads(record.read_text())["benchmarks"]
    assert len(saved["flips"]) == 20 and saved["difference"] == -50.0


def test_parts_of_a_point_are_tested_by_a_paired_bootstrap(two: StoreBuilder) -> None:
    for name, gain in (("pretrain", 0.0), ("finetune", 0.3)):
        folder = two.root / "stages" / two.key("eval", f"digits@{name}")
        rows = [{**row, "score": 0.3 + gain + 0.01 * (n % 7)} for n, row in enumerate(rows_of(folder))]
        (folder / "output/generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (pair,) = compare_runs(collect_report(two.root, ["b", "a"]))
    assert pair.test == "paired bootstrap" and pair.difference == pytest.approx(30) and pair.p_value < 0.01


def test_equal_runs_differ_by_nothing_and_are_not_said_to_be_equal(two: StoreBuilder) -> None:
    two.run("c")
    (pair,) = compare_runs(collect_report(two.root, ["a", "c"]))
    assert pair.difference == 0 and pair.p_value == 1 and not pair.flips
    assert pair.interval[0] < 0 < pair.interval[1] and "may well be chance" in pair.verdict


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(two: StoreBuilder) -> None:
    with pytest.raises(UserError, match="takes the names of two runs, found 1"):
        compare_runs(collect_report(two.root, ["a"]))
    scores = two.root / "stages" / two.key("eval", "digits@pretrain") / "output/scores.json"
    scores.write_text(scores.read_text().replace("exact match", "another"))
    with pytest.raises(UserError, match="scored by exact match and by another, which are not comparable"):
        compare_runs(collect_report(two.root, ["a", "b"]))


def test_the_command_prints_the_table_the_sentence_and_where_the_page_is(two: StoreBuilder) -> None:
    result = CliRunner().invoke(APP, ["--compare", "a", "b", "--store", str(two.root)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "−50.0" in result.stdout and "McNemar" in result.stdout and "compare.html" in result.stdout
    assert "expected 'seven'" in result.stdout


def test_images_trained_on_and_asked_about_are_counted(store: StoreBuilder) -> None:
    store.whole("a")
    data = store.root / "stages" / store.key("data", "digits") / "output"
    (data / "images/train").mkdir()
    shutil.copy(data / "images/test/3.png", data / "images/train/other.png")
    (data / "train.json").write_text(json.dumps([{"id": "1", "image": "other.png"}]))
    spec = store.root / "stages" / store.key("prepare", "prepare[pretrain]") / "spec.json"
    location = {"root": str(data), "source": {"annotations": "train.json", "images": "images/train"}}
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "settings": {"location": location}}))
    folder = store.root / "stages" / store.key("eval", "digits@finetune")
    rows = [{**row, "images": [{"path": row["image"]}]} for row in rows_of(folder)]
    (folder / "output/generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = CliRunner().invoke(APP, ["--overlap", "a", "--store", str(store.root)])
    assert result.exit_code == 0, result.output
    assert "of 40 images were trained on (1 training images)" in result.stdout
    assert "3.png is" in result.stdout and "other.png" in result.stdout
