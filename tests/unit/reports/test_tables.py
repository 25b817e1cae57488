"""tables.py and wording.py: the same numbers as Markdown, in the terminal, and as tidy rows."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from tinylmm.evaluation.protocol import Protocol
from tinylmm.evaluation.statistics import wilson
from tinylmm.reports.collect import collect_report
from tinylmm.reports.records import Report, Score
from tinylmm.reports.tables import (
    compare_grid,
    escape_markdown,
    render_markdown,
    render_scores,
    result_rows,
    score_grid,
)
from tinylmm.reports.wording import duration, points, verdict

from .conftest import StoreBuilder


def terminal(report: Report) -> str:
    console = Console(file=StringIO(), width=120, record=True)
    console.print(render_scores(report))
    return console.export_text()


def test_grid_shows_every_stage_beside_blind_and_chance(store: StoreBuilder) -> None:
    store.whole()
    header, rows = score_grid(collect_report(store.root).runs[0])
    assert header == ["metric", "after pretrain", "after finetune", "95 %", "blind", "chance", "n"]
    assert rows[0] == ["accuracy", "30.0", "80.0", "65.2–89.5", "20.0", "10.0", "40"]
    assert [row[0] for row in rows[1:]] == ["digit", "colour", "count", "multiple choice"]


def test_what_was_not_measured_is_a_dash(store: StoreBuilder) -> None:
    store.stage("train", "finetune")
    folder = store.evaluation("finetune", 5)
    store.scores(folder, [{"metric": "accuracy", "value": 50.0, "blind": None, "chance": None, "count": 1500}])
    store.run("bare")
    assert score_grid(collect_report(store.root).runs[0])[1] == [["accuracy", "50.0", "47.5–52.5", "–", "–", "1,500"]]
    metric = {"metric": "points", "value": 1400.0, "blind": None, "chance": None, "count": 9, "interval": [1300, 1500]}
    store.scores(folder, [metric])
    report = collect_report(store.root)
    assert score_grid(report.runs[0])[1] == [["points", "1400.0", "1300.0–1500.0", "–", "–", "9"]]
    assert "scores in %" not in terminal(report)


def test_terminal_shows_a_bracketed_category_as_it_is(store: StoreBuilder) -> None:
    store.whole(category="[red]x[/]")
    assert "[red]x[/]" in terminal(collect_report(store.root))


def test_several_runs_stand_one_a_row(store: StoreBuilder) -> None:
    store.whole("a")
    store.run("b", **{"digits@finetune": "todo"})
    report = collect_report(store.root, ["a", "b"])
    header, rows = compare_grid(report)
    assert header[:3] == ["run", "after", "accuracy"]
    assert [row[:3] for row in rows] == [["a", "finetune", "80.0"], ["b", "pretrain", "30.0"]]
    assert "2 runs" in terminal(report)


def test_run_without_evaluation_has_an_empty_table_and_says_why(store: StoreBuilder) -> None:
    store.stage("train", "pretrain")
    store.run("bare")
    text = render_markdown(collect_report(store.root))
    assert "No evaluation has finished" in text
    assert "The run is done; it had no evaluation." in " ".join(terminal(collect_report(store.root)).split())


def test_results_are_tidy_rows_of_the_scores_files(store: StoreBuilder) -> None:
    store.whole()
    rows = result_rows(collect_report(store.root))
    assert len(rows) == 10
    names = {"run": "nano-base", "stage": "pretrain", "benchmark": "digits", "metric": "accuracy"}
    assert rows[0] == {
        **names,
        "value": 30.0,
        "blind": 20.0,
        "chance": 10.0,
        "count": 40,
        "interval": rows[0]["interval"],
        "evaluation": "digits",
        "limited": False,
        "protocol": Protocol.of_json("exact match", "digits").as_json(),
    }
    low, high = rows[0]["interval"]
    assert low == pytest.approx(18.07, abs=0.01) and high == pytest.approx(45.43, abs=0.01)


def test_markdown_has_verdict_scores_stages_and_command(store: StoreBuilder) -> None:
    store.whole()
    text = render_markdown(collect_report(store.root))
    assert text.startswith("# nano-base\n\n80.0 % of 40 held-out questions (digits) are answered right after finetune")
    assert "| accuracy | 30.0 | 80.0 | 65.2–89.5 | 20.0 | 10.0 | 40 |" in text
    assert "| llm/nano | parts |" in text
    assert "tinylmm-train llm=nano recipe=base" in text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a|b", r"a\|b"),
        ("two\nlines", "two lines"),
        ("<img src=x>", "&lt;img src=x&gt;"),
        ("[x](javascript:y)", r"\[x\](javascript:y)"),
        ("`code`", r"\`code\`"),
        ("see https://x.org, www.x.org", "see https&#58;//x.org, www&#46;x.org"),
        ("@name $x$", "&#64;name &#36;x&#36;"),
        ("- item", r"\- item"),
        ("1. item", r"1\. item"),
        ("80.0 % -5", "80.0 % -5"),
        ("a\x1b[2J\u202eb", r"a\\x1b\[2J\\u202eb"),
    ],
    ids=[
        *("cell", "newline", "html", "link", "code"),
        *("address", "mention-and-formula", "list", "numbers", "figure", "controls"),
    ],
)
def test_markdown_shows_names_as_they_are(text: str, escaped: str) -> None:
    assert escape_markdown(text) == escaped


@pytest.mark.parametrize(
    ("value", "blind", "words"),
    [
        (80.0, 20.0, "60.0 points above the same model without the image (20.0 %)"),
        (20.0, 80.0, "60.0 points below the same model without the image (80.0 %)"),
        (52.0, 50.0, "not clearly different from the same model without the image (50.0 %)"),
    ],
    ids=["above", "below", "within noise"],
)
def test_verdict_claims_no_more_than_the_sample_allows(
    store: StoreBuilder, value: float, blind: float, words: str
) -> None:
    store.stage("train", "finetune")
    folder = store.evaluation("finetune", 5)
    store.scores(folder, [{"metric": "accuracy", "value": value, "blind": blind, "chance": None, "count": 100}])
    store.run("bare")
    assert words in verdict(collect_report(store.root).runs[0])


def test_verdict_of_a_failed_run_names_stage_and_reason(store: StoreBuilder) -> None:
    folder = store.stage("train", "pretrain")
    work = store.root / "work" / folder.name
    work.mkdir(parents=True)
    (work / "error.txt").write_text("Traceback\nNonFiniteError: loss is nan\n")
    store.run("broken", status="failed", pretrain="failed")
    sentence = verdict(collect_report(store.root, ["broken"]).runs[0])
    assert sentence == "The run failed in stage pretrain after 0 of 1 stages: NonFiniteError: loss is nan"


def test_interval_is_wilsons() -> None:
    # 8 of 10: statsmodels.stats.proportion.proportion_confint(8, 10, method="wilson") gives 0.49016, 0.94333
    low, high = Score("digits", "accuracy", 80.0, None, None, 10).interval() or (0, 0)
    assert (round(low, 2), round(high, 2)) == (49.02, 94.33)
    assert (low, high) == tuple(100 * end for end in wilson(0.8, 10))
    assert Score("mme", "perception", 1500.0, None, None, 10).interval() is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (0.44, "0.4 s"), (59.4, "59 s"), (59.7, "1 min 00 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")],
)
def test_durations_read_naturally(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_a_loss_of_points_has_a_minus_sign() -> None:
    assert (points(-3.24), points(3.25)) == ("−3.2", "+3.2")
