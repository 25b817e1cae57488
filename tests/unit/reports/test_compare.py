"""Two runs compared question by question: difference, how sure, and which answers flipped with their images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from tinylmm.cli.report import report as command
from tinylmm.errors import UserError
from tinylmm.reports.collect import collect_report
from tinylmm.reports.compare import compare_runs, pair_notes
from tinylmm.reports.write import write_comparison

from .conftest import StoreBuilder

APP = typer.Typer()
APP.command()(command)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "output/generations.jsonl").read_text().splitlines()]


def folder_of(store: StoreBuilder, stage: str) -> Path:
    return store.root / "stages" / store.key("eval", f"digits@{stage}")


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    (folder / "output/generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rewrite(store: StoreBuilder, stage: str, change: Callable[[int, dict[str, Any]], dict[str, Any]]) -> None:
    """Change rows of an evaluation's answers."""
    folder = folder_of(store, stage)
    write_rows(folder, [{**row, **change(number, row)} for number, row in enumerate(rows_of(folder))])


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
    assert pair.wins == (20, 0) and pair.p_value == pytest.approx(
        2 / 2**20
    )  # one question an image: McNemar's exact test
    assert pair.better == 0 and pair.verdict.startswith("The first is better: −50.0 points")
    assert pair.interval[0] < -50 < pair.interval[1] < 0
    assert "the second answered 0 better and 20 worse." in pair.verdict
    back = compare_runs(collect_report(two.root, ["b", "a"]))[0]
    assert back.difference == 50.0 and back.wins == (0, 20)


def test_the_page_shows_flipped_questions_with_their_images_and_nothing_from_outside(two: StoreBuilder) -> None:
    rewrite(two, "pretrain", lambda n, row: {"text": "<script>alert(1)</script>"} if n == 3 else {})
    for name in ("pretrain", "finetune"):
        rewrite(two, name, lambda n, row: {"image": "../../../../../spec.json"} if n == 4 else {})
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
    assert pair.difference == pytest.approx(30) and pair.p_value is not None and pair.p_value < 0.01
    assert pair.interval[0] < 30 < pair.interval[1]  # every question gained as much, which is no certainty


def test_identical_answers_are_called_that(two: StoreBuilder) -> None:
    two.run("c")
    (pair,) = compare_runs(collect_report(two.root, ["a", "c"]))
    assert (pair.difference, pair.p_value, pair.better, pair.flips) == (0, None, None, ())
    assert pair.interval[0] < 0 < pair.interval[1]
    assert pair.verdict == "Identical answers to all 40 questions."


def test_other_words_of_equal_worth_are_not_identical(two: StoreBuilder) -> None:
    rewrite(two, "pretrain", lambda n, row: rows_of(folder_of(two, "finetune"))[n] | {"text": f"so: {n}"})
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert pair.verdict == "All 40 questions were graded alike; 40 answers differ in words." and pair.p_value == 1.0


def test_other_questions_of_equal_ids_are_not_paired(two: StoreBuilder) -> None:
    rewrite(two, "pretrain", lambda n, row: {"question": f"How many dogs are in picture {n}?"} if n < 30 else {})
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (pair.count, pair.unpaired) == (10, 60)
    assert pair_notes(pair) == ["60 questions were asked of one of them only, and do not count."]
    rewrite(two, "pretrain", lambda n, row: {"truth": "another"})
    with pytest.raises(UserError, match="of digits no question was asked of both and scored"):
        compare_runs(collect_report(two.root, ["a", "b"]))


def test_questions_are_paired_by_content_under_other_ids(two: StoreBuilder) -> None:
    (before,) = compare_runs(collect_report(two.root, ["a", "b"]))
    rewrite(two, "pretrain", lambda n, row: {"question_id": f"x{39 - n}"})
    (after,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (after.count, after.difference, after.p_value) == (40, before.difference, before.p_value)


def other_data(two: StoreBuilder, change: bool) -> None:
    """Let run b's evaluation read a folder of its own, whose images have the same names."""
    here = two.root / "stages" / two.key("data", "digits") / "output/images/test"
    there = two.root.parent / "other"
    shutil.copytree(here, there)
    if change:
        for number in range(0, 40, 2):
            (there / f"{number}.png").write_bytes((here / f"{(number + 3) % 40}.png").read_bytes() + b" ")
    spec = folder_of(two, "pretrain") / "spec.json"
    location = {"root": str(there), "source": {"images": ""}}
    record = json.loads(spec.read_text())
    parents = {"model": record["parents"]["model"]}
    spec.write_text(json.dumps({**record, "parents": parents, "settings": {"location": location}}))


@pytest.mark.parametrize(("change", "count"), [(False, 40), (True, 20)])
def test_images_of_equal_names_in_other_data_are_told_by_their_bytes(
    two: StoreBuilder, change: bool, count: int
) -> None:
    other_data(two, change)
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (pair.count, pair.unpaired) == (count, 2 * (40 - count))


def test_six_questions_an_image_are_not_six_pieces_of_evidence(two: StoreBuilder) -> None:
    """The second loses eight images of six questions and wins two: p is that of 8 against 2, not of 48 against 12."""
    for name, lost in (("finetune", range(8, 10)), ("pretrain", range(8))):
        one = rows_of(folder_of(two, name))[0]
        rows = [
            {
                **one,
                "question_id": f"{image}-{n}",
                "question": f"q{n}",
                "image": f"{image}.png",
                "score": image not in lost,
            }
            for image in range(40)
            for n in range(6)
        ]
        write_rows(folder_of(two, name), rows)
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert pair.wins == (48, 12) and pair.p_value == pytest.approx(2 * 56 / 1024)
    assert pair.better is None and "may well be chance" in pair.verdict
    assert pair.interval[0] < pair.difference < pair.interval[1]


def test_the_cluster_that_the_evaluation_found_counts_where_cells_repeat_an_image(two: StoreBuilder) -> None:
    for name in ("finetune", "pretrain"):
        rewrite(two, name, lambda n, row: {"cluster": str(n // 20), "category": "", "score": float(row["correct"])})
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert pair.p_value == 0.5  # two images


def test_ratings_are_shares_of_the_best_one_and_unread_ones_do_not_count(two: StoreBuilder) -> None:
    ratings = {"finetune": (7, 8, -1, 3), "pretrain": (6, 8, 5, 4)}
    for name in ratings:
        rewrite(two, name, lambda n, row, given=ratings[name]: {"score": float(given[n % 4]), "correct": None})
        scores = folder_of(two, name) / "output/scores.json"
        protocol = {"benchmark": "digits", "variant": "llava", "top": 10.0}
        scores.write_text(json.dumps({**json.loads(scores.read_text()), "protocol": protocol}))
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (pair.count, pair.ungraded) == (30, 10) and pair.means == pytest.approx((60.0, 60.0))
    assert "10 questions have no grade of either, and do not count." in pair_notes(pair)


def test_several_comparisons_are_corrected_for_and_say_so(two: StoreBuilder) -> None:
    rewrite(two, "pretrain", lambda n, row: {"correct": (n * 7 % 10 < 8) != (n < 6)})
    (alone,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert alone.p_value is not None and 0.02 < alone.p_value < 0.5 and alone.corrected == alone.p_value
    two.run("c", **{"digits@finetune": "todo"})
    both = compare_runs(collect_report(two.root, ["a", "b", "c"]))
    assert [pair.runs for pair in both] == [("a", "b"), ("a", "c")]
    assert [pair.corrected for pair in both] == [pytest.approx(min(1.0, 2 * alone.p_value))] * 2
    assert "corrected for 2 comparisons" in both[0].verdict
    report = collect_report(two.root, ["a", "b", "c"])
    page, record = write_comparison(report, both)
    assert "2 comparisons were made" in page.read_text()
    assert [row["runs"] for row in json.loads(record.read_text())["benchmarks"]] == [["a", "b"], ["a", "c"]]


def test_samples_are_compared_on_what_both_were_asked_and_marked(two: StoreBuilder) -> None:
    for name, asked in (("finetune", 40), ("pretrain", 10)):
        scores = folder_of(two, name) / "output/scores.json"
        protocol = {"benchmark": "digits", "variant": "exact", "asked": asked, "total": 40, "limit": asked}
        scores.write_text(json.dumps({**json.loads(scores.read_text()), "protocol": protocol}))
    write_rows(folder_of(two, "pretrain"), rows_of(folder_of(two, "pretrain"))[::4])
    report = collect_report(two.root, ["a", "b"])
    (pair,) = compare_runs(report)
    assert (pair.count, pair.unpaired) == (10, 30)
    assert "questions 40 and 10 of 40 (limit 10, seed 0)" in pair_notes(pair)[1]
    assert "digits (sample)" in write_comparison(report, [pair])[0].read_text()


def test_runs_that_cannot_be_compared_are_refused_with_the_reason(two: StoreBuilder) -> None:
    with pytest.raises(UserError, match="takes the names of two runs, found 1"):
        compare_runs(collect_report(two.root, ["a"]))
    scores = two.root / "stages" / two.key("eval", "digits@pretrain") / "output/scores.json"
    scores.write_text(scores.read_text().replace("exact match", "another"))
    with pytest.raises(UserError, match=r"not comparable \(protocol digits-exact match and digits-another\)"):
        compare_runs(collect_report(two.root, ["a", "b"]))


def test_the_command_prints_the_table_the_sentence_and_where_the_page_is(two: StoreBuilder) -> None:
    result = CliRunner().invoke(APP, ["--compare", "a", "b", "--store", str(two.root)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "−50.0" in result.stdout and "p = 1.9e-06" in result.stdout and "compare.html" in result.stdout
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


def test_questions_that_are_right_only_together_are_compared_as_one(two: StoreBuilder) -> None:
    # four rotations a group: `a` answers all of them, `b` misses one rotation of every second group, in other words elsewhere
    for name, wrong in (("finetune", ()), ("pretrain", (0,))):
        rewrite(
            two,
            name,
            lambda n, row, wrong=wrong: {
                "group": str(n // 4),
                "score": float(not (n % 4 in wrong and n // 4 % 2 == 1)),
                "text": f"{row['question_id']} {n % 4 in wrong and n // 4 % 2 == 1}",
            },
        )
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert (pair.count, pair.means, pair.wins, pair.same) == (10, (100.0, 50.0), (5, 0), 5)
    assert [flip.scores for flip in pair.flips] == [(1.0, 0.0)] * 5
    assert all(flip.texts[0] != flip.texts[1] for flip in pair.flips)


def test_groups_of_one_store_only_are_compared_question_by_question(two: StoreBuilder) -> None:
    rewrite(two, "finetune", lambda n, row: {"group": str(n // 4)})
    (pair,) = compare_runs(collect_report(two.root, ["a", "b"]))
    assert pair.count == 40
