"""What a figure was made by stands beside it: samples, options, splits, protocols of several runs, hidden answers, ratings."""

from __future__ import annotations

import base64
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tinylmm.errors import UserError
from tinylmm.evaluation.protocol import Protocol
from tinylmm.reports.collect import collect_report
from tinylmm.reports.compare import compare_runs
from tinylmm.reports.html import render_html
from tinylmm.reports.picture import results_picture
from tinylmm.reports.published import published_grid
from tinylmm.reports.records import Report
from tinylmm.reports.study import study_of
from tinylmm.reports.tables import (
    compare_grid,
    compare_notes,
    protocol_grid,
    protocol_line,
    render_markdown,
    render_scores,
    score_grid,
)
from tinylmm.reports.wording import verdict

from .conftest import SPEC, StoreBuilder, digest_of, write

WHOLE = {"benchmark": "gqa", "variant": "llava", "asked": 12578, "total": 12578, "template": "phi", "code": 3}
SAMPLE = WHOLE | {"asked": 300, "limit": 300, "departs": ["a sample of 300 of 12,578 questions"]}


def evaluate(
    store: StoreBuilder,
    name: str,
    metrics: dict[str, float],
    protocol: dict[str, Any],
    model: str = "finetune",
    rows: list[dict[str, Any]] | None = None,
) -> Path:
    """An evaluation `name` after training stage `model`."""
    spec = {"benchmark": protocol["benchmark"]}
    folder = store.stage("eval", f"{name}@{model}", spec, parents={"model": digest_of(model)})
    figures = [
        {"metric": metric, "value": value, "blind": None, "chance": None, "count": protocol.get("asked", 9)}
        for metric, value in metrics.items()
    ]
    record = {"benchmark": protocol["benchmark"], "protocol": protocol, "metrics": figures}
    write(folder / "output/scores.json", record)
    (folder / "output/generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))
    return folder


def trained(store: StoreBuilder, name: str = "finetune") -> None:
    store.stage("train", name)


def terminal(report: Report) -> str:
    console = Console(file=StringIO(), width=200, record=True)
    console.print(render_scores(report))
    return console.export_text()


def test_every_figure_of_a_sample_is_marked_everywhere(store: StoreBuilder) -> None:
    trained(store)
    evaluate(store, "gqa", {"accuracy": 61.0, "open": 40.0, "steps/02": 55.0}, SAMPLE)
    store.run("limited")
    report = collect_report(store.root)
    (run,) = report.runs
    labels = [row[0] for row in score_grid(run)[1]]
    assert labels == ["accuracy (sample of 300)", "open (sample of 300)", "steps 02 (sample)"]
    assert "(gqa, a sample of 300 of 12,578 questions)" in verdict(run)
    texts = [terminal(report), render_markdown(report), render_html(report)]
    assert all(text.count("sample") >= 4 for text in texts)
    assert all("300 of 12,578 (limit 300, seed 0)" in text for text in texts)


def test_rows_keep_their_category(store: StoreBuilder) -> None:
    trained(store)
    evaluate(
        store, "pope", {"f1": 80.0, "random/f1": 81.0, "popular/f1": 79.0}, {"benchmark": "pope", "variant": "llava"}
    )
    metrics = {"perception": 900.0, "existence/acc": 90.0, "existence/acc+": 80.0, "code_reasoning/acc": 50.0}
    evaluate(store, "mme", metrics, {"benchmark": "mme", "variant": "llava"})
    store.run("r")
    labels = [row[0] for row in score_grid(collect_report(store.root).runs[0])[1]]
    assert labels[:3] == ["pope: f1", "pope: random f1", "pope: popular f1"]
    assert labels[3:] == ["mme: perception", "mme: existence acc", "mme: existence acc+", "mme: code reasoning acc"]


def test_two_evaluations_on_one_benchmark_are_two(store: StoreBuilder) -> None:
    trained(store)
    with_ocr = {"benchmark": "textvqa", "variant": "llava", "options": {"ocr": True}}
    evaluate(store, "textvqa", {"accuracy": 60.0}, with_ocr)
    evaluate(store, "plain", {"accuracy": 50.0}, with_ocr | {"options": {"ocr": False}, "departs": ["ocr=false"]})
    store.run("r")
    (run,) = collect_report(store.root).runs
    assert [row[:2] for row in score_grid(run)[1]] == [
        ["textvqa: accuracy", "60.0"],
        ["plain: accuracy (ocr=false)", "50.0"],
    ]
    header, rows = protocol_grid(run)
    assert [dict(zip(header, row, strict=True))["ocr"] for row in rows] == ["true", "false"]


def two_runs(store: StoreBuilder, second: dict[str, Any]) -> Report:
    trained(store, "one")
    evaluate(store, "gqa", {"accuracy": 61.0}, WHOLE, "one")
    store.run("a")
    store.stages.clear()
    trained(store, "two")
    evaluate(store, "gqa", {"accuracy": 64.0}, second, "two")
    store.run("b")
    return collect_report(store.root, ["a", "b"])


@pytest.mark.parametrize(
    ("second", "cells", "apart"),
    [
        (WHOLE, ["61.0", "64.0"], ""),
        (SAMPLE, ["61.0 a", "64.0 b (sample)"], "questions 12,578 and 300 of 12,578 (limit 300, seed 0)"),
        (WHOLE | {"template": "llama"}, ["61.0 a", "64.0 b"], "template phi and llama"),
        (WHOLE | {"code": 4}, ["61.0 a", "64.0 b"], "code 3 and 4"),
    ],
    ids=["equal", "sample", "template", "code"],
)
def test_figures_of_different_protocols_do_not_stand_in_one_column_unmarked(
    store: StoreBuilder, second: dict[str, Any], cells: list[str], apart: str
) -> None:
    report = two_runs(store, second)
    assert [row[2] for row in compare_grid(report)[1]] == cells
    notes = compare_notes(report)
    assert (len(notes) == 3 and apart in notes[1]) if apart else notes == []
    for text in (terminal(report), render_markdown(report), render_html(report)):
        assert ("are not comparable" in text) == bool(apart)


CLIPS = WHOLE | {"frames": "uniform 8"}
FEWER = CLIPS | {"frames": "uniform 4"}
MIDDLE = WHOLE | {"frames": "middle of uniform 8"}
OPEN: dict[str, Any] = {"template": "auto", "sampling": None}


@pytest.mark.parametrize(
    ("first", "second", "asked", "column"),
    [
        (WHOLE, WHOLE | {"template": "llama"}, (OPEN, OPEN), "template the model's own"),
        (CLIPS, FEWER, (OPEN, OPEN), "template phi, frames the model's own"),
        (MIDDLE, WHOLE | {"frames": "middle of uniform 4"}, (OPEN, OPEN), "frames middle of the model's own"),
        (CLIPS, CLIPS, (OPEN, OPEN | {"sampling": {"uniform": 8}}), "frames uniform 8"),
        (WHOLE, WHOLE, (OPEN | {"template": "phi"}, OPEN), "template phi"),
        (WHOLE, WHOLE | {"template": "llama"}, (OPEN, OPEN | {"template": "llama"}), None),
        (CLIPS, FEWER, (OPEN, OPEN | {"sampling": {"uniform": 4}}), None),
        (CLIPS, MIDDLE, (OPEN, OPEN), None),
        (WHOLE | {"precision": "fp32"}, WHOLE | {"precision": "bf16"}, (OPEN, OPEN), None),
    ],
    ids=["templates", "frames", "baselines", "named and open", "open and named", "one template named", "one sampling named",
         "a baseline and none", "precision"],
)  # fmt: skip
def test_what_was_left_to_each_model_is_no_difference_of_protocols(
    store: StoreBuilder,
    first: dict[str, Any],
    second: dict[str, Any],
    asked: tuple[dict[str, Any], ...],
    column: str | None,
) -> None:
    for name, protocol, fields in (("a", first, asked[0]), ("b", second, asked[1])):
        store.stages.clear()
        trained(store, name)
        rows = [row(n, image=f"{n}.png", score=float(n % 2), correct=n % 2 == 1) for n in range(9)]
        evaluate(store, "gqa", {"accuracy": 61.0}, protocol, name, rows)
        path = store.run(name) / "run.json"
        changed = SPEC | {"eval": {"gqa": {"benchmark": "gqa", **fields}}, "llm": {"name": name}}
        write(path, json.loads(path.read_text()) | {"spec": changed})
    report = collect_report(store.root, ["a", "b"])
    study = study_of(report)
    assert study is not None
    assert len(study.columns) == (1 if column else 2)
    assert (compare_notes(report) == []) == (column is not None)
    if column is None:
        with pytest.raises(UserError, match="not comparable"):
            compare_runs(report)
    else:
        assert column in protocol_line(study.columns[0].protocol or Protocol("", ""))
        assert compare_runs(report)[0].count == 9


def test_published_figures_stand_beside_what_sets_ours_apart(store: StoreBuilder) -> None:
    trained(store)
    evaluate(store, "gqa", {"accuracy": 61.0}, SAMPLE)
    textvqa = {"benchmark": "textvqa", "variant": "llava", "departs": ["ocr=false"]}
    evaluate(store, "textvqa", {"accuracy": 50.0}, textvqa)
    evaluate(store, "vqav2", {"accuracy": 70.0}, {"benchmark": "vqav2", "variant": "official", "split": "val"})
    judged = {"benchmark": "mmvet", "variant": "official", "judge": "small-judge"}
    evaluate(store, "mmvet", {"total": 30.0}, judged)
    path = store.run("phi2-run") / "run.json"
    write(path, json.loads(path.read_text()) | {"spec": SPEC | {"llm": {"name": "phi2", "init": "pretrained"}}})
    ours = {row[0]: row[3] for row in published_grid(collect_report(store.root).runs[0])[1]}
    assert ours == {
        "gqa": "61.0 (a sample of 300 of 12,578 questions)",
        "textvqa": "50.0 (ocr=false)",
        "vqav2": "70.0 (split val)",
        "mmvet": "30.0 (judged by small-judge)",
    }


def row(number: int, **more: Any) -> dict[str, Any]:
    asked = {"question_id": number, "category": "other", "prompt": f"question {number}?", "truth": "", "text": "red"}
    return {"item_id": str(number), **asked, "score": None, "correct": None, "blind_text": None, **more}


def test_hidden_answers_are_neither_right_nor_wrong_and_the_upload_is_named(store: StoreBuilder) -> None:
    trained(store)
    protocol = {"benchmark": "vqav2", "variant": "official", "split": "test-dev"}
    folder = evaluate(store, "vqav2", {}, protocol, rows=[row(n) for n in range(12)])
    (folder / "output/upload.json").write_text("[]")
    store.run("r")
    report = collect_report(store.root)
    (example, *_) = report.runs[0].examples["vqav2"]
    assert example.answer.correct is None
    html = render_html(report)
    assert html.count('<li class="card neutral">') == 12 and "✗" not in html and "✓" not in html
    assert "truth:" not in html and str(folder / "output/upload.json") in html
    for text in (html, render_markdown(report), terminal(report)):
        assert "vqav2 after finetune has no figure" in text and "upload.json" in text.replace("\n", "")


def test_a_rating_is_shown_as_one_and_never_as_right(store: StoreBuilder) -> None:
    trained(store)
    protocol = {"benchmark": "llava_bench", "variant": "llava", "top": 10.0}
    rows = [row(n, score=float(rating)) for n, rating in enumerate((3, 9, -1))]
    evaluate(store, "llava_bench", {"all": 60.0}, protocol, rows=rows)
    store.run("r")
    html = render_html(collect_report(store.root))
    assert "3 of 10" in html and "9 of 10" in html and "rating could not be read" in html
    assert '<li class="card right">' not in html and '<li class="card wrong">' not in html


def test_ratings_of_two_runs_are_compared_on_their_own_scale(store: StoreBuilder) -> None:
    protocol = {"benchmark": "llava_bench", "variant": "llava", "top": 10.0}
    for model, rating in (("one", 4.0), ("two", 4.5)):
        store.stages.clear()
        trained(store, model)
        rows = [row(n, score=rating, text=model) for n in range(4)]
        evaluate(store, "llava_bench", {"all": 60.0}, protocol, model, rows)
        store.run(model)
    (pair,) = compare_runs(collect_report(store.root, ["one", "two"]))
    assert pair.means == pytest.approx((40.0, 45.0)) and pair.difference == pytest.approx(5.0)


def test_images_in_a_table_of_base64_are_shown(store: StoreBuilder) -> None:
    store.whole()
    folder = store.root / "stages" / store.key("data", "digits") / "output/images/test"
    lines = ["index\timage"]
    lines += [f"{n}\t{base64.b64encode((folder / f'{n}.png').read_bytes()).decode()}" for n in range(store.questions)]
    (folder / "questions.tsv").write_text("\n".join(lines) + "\n")
    for name in ("pretrain", "finetune"):
        path = store.root / "stages" / store.key("eval", f"digits@{name}") / "output/generations.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for number, one in enumerate(rows, 1):
            one |= {"images": [{"path": "questions.tsv", "row": number, "column": "image"}]}
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    html = render_html(collect_report(store.root))
    assert html.count('src="data:image/png;base64,') == 24 and '<div class="missing">' not in html


def test_the_picture_shows_the_categories_of_a_headline_that_stands_behind_them(
    store: StoreBuilder, tmp_path: Path
) -> None:
    trained(store)
    metrics = {"f1": 80.0, "accuracy": 81.0, "random/f1": 82.0, "popular/f1": 83.0}
    rows = [row(n, score=1.0, correct=True) for n in range(6)]
    evaluate(store, "pope", metrics, {"benchmark": "pope", "variant": "llava"}, rows=rows)
    store.run("r")
    results_picture(collect_report(store.root), tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 5000
