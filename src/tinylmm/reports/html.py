"""The report as one HTML file that needs nothing else: no script, no network, no file beside it.

Everything the user or a model wrote passes through Jinja2's autoescaping; only our own SVG is marked safe. The page's
content security policy forbids scripts and all loading besides, should anything ever slip through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml
from jinja2 import Environment
from markupsafe import Markup

from tinylmm.reports.compare import Pair, p_text, pair_notes
from tinylmm.reports.effects import Findings
from tinylmm.reports.figures import picture_svg, study_pictures
from tinylmm.reports.pages import page_environment
from tinylmm.reports.plots import loss_svg
from tinylmm.reports.published import published_grid
from tinylmm.reports.records import Example, Report, RunReport, Score, ScoreRow, StageReport
from tinylmm.reports.speed import speed_words, verified_words
from tinylmm.reports.study_tables import study_sections
from tinylmm.reports.tables import (
    compare_grid,
    compare_notes,
    protocol_grid,
    protocol_line,
    row_label,
    served_cells,
    use_commands,
)
from tinylmm.reports.thumbnails import ThumbnailError, thumbnail
from tinylmm.reports.wording import duration, facts, moment, number, points, recipe_rows, span, verdict, words
from tinylmm.store.runs import TRAIN
from tinylmm.version import __version__

CURVE_KINDS = ("parts", "train")
FLIPS_A_SIDE = 30


def render_html(report: Report, findings: Findings | None = None) -> str:
    """Return the page; of runs that differ, what they say together comes first."""
    environment = _environment()
    single = len(report.runs) == 1
    header, rows = compare_grid(report) if findings is None else ([], [])
    return environment.get_template("report.html.j2").render(
        title=_title(report, findings),
        single=single,
        study=None if findings is None else _study(findings),
        compare={"header": header, "rows": rows, "notes": [] if single else compare_notes(report)},
        runs=[_run(run, f"run{index}") for index, run in enumerate(report.runs)],
        version=__version__,
    )


def _title(report: Report, findings: Findings | None) -> str:
    if len(report.runs) == 1:
        return report.runs[0].name
    if findings is None:
        return f"{len(report.runs)} runs side by side"
    varying = [factor.title for factor in findings.study.factors.varying] or ["seeds"]
    return f"{len(report.runs)} runs by {', '.join(varying[:-1])}{' and ' if varying[1:] else ''}{varying[-1]}"


def _study(findings: Findings) -> dict[str, Any]:
    study = findings.study
    drawn = study_pictures(findings)
    pictures = {one.name: {"record": one, "svg": Markup(picture_svg(one, f"study-{one.name}"))} for one in drawn}
    return {
        "sections": study_sections(findings),
        "served": [(study.label(place), command) for place, command in served_cells(study)],
        "links": [[(seed, run) for seed, run in zip(cell.seeds, cell.runs, strict=True)] for cell in study.cells],
        "cost": [pictures[name] for name in pictures if name == "cost"],
        "pictures": [pictures[name] for name in pictures if name != "cost"],
    }


def render_comparison_html(report: Report, pairs: Sequence[Pair]) -> str:
    """Return the page of a comparison; of each run's wins the first FLIPS_A_SIDE are shown with their images."""
    return (
        _environment()
        .get_template("compare.html.j2")
        .render(
            names=[run.name for run in report.runs],
            pairs=[
                {
                    "record": pair,
                    "title": f"{pair.name}, {pair.runs[1]}" if len(report.runs) > 2 else pair.name,
                    "notes": pair_notes(pair),
                    "protocol": protocol_line(pair.protocols[1]),
                    "sides": [_side(pair, 1), _side(pair, 0)],
                }
                for pair in pairs
            ],
            comparisons=max((pair.comparisons for pair in pairs), default=1),
            version=__version__,
        )
    )


def _side(pair: Pair, winner: int) -> tuple[str, list[dict[str, Any]], int]:
    """Title, cards and number of the questions that one run answered better."""
    flips = [flip for flip in pair.flips if flip.winner == winner]
    cards = []
    for flip in flips[:FLIPS_A_SIDE]:
        try:
            cards.append({"flip": flip, "image": thumbnail(flip.image), "missing": ""})
        except ThumbnailError as reason:
            cards.append({"flip": flip, "image": None, "missing": str(reason)})
    return f"The {'second' if winner else 'first'} answered better", cards, len(flips)


def _environment() -> Environment:
    return page_environment(number=number, duration=duration, moment=moment, words=words, points=points, p_text=p_text)


def _run(run: RunReport, identifier: str) -> dict[str, Any]:
    headline = run.headline
    return {
        "id": identifier,
        "record": run,
        "verdict": verdict(run).replace(" %", "\N{NO-BREAK SPACE}%"),
        "headline": {"stage": headline[0], "score": headline[1], "interval": headline[1].interval()}
        if headline
        else None,
        "facts": facts(run.record.spec),
        "recipe": recipe_rows(run.record.spec),
        "spec": yaml.safe_dump(dict(run.record.spec), sort_keys=False, allow_unicode=True, width=100),
        "timeline": _timeline(run),
        "curves": [
            _curve(stage, f"{identifier}-curve{index}")
            for index, stage in enumerate(run.stages)
            if stage.kind in CURVE_KINDS and stage.curve()[0]
        ],
        "scores": _scores(run),
        "published": dict(zip(("header", "rows"), published_grid(run), strict=True)),
        "examples": [
            {"name": name, "total": _total(run, name), "cards": [_card(example) for example in examples]}
            for name, examples in run.examples.items()
            if examples
        ],
        "locations": _locations(run),
        "use": use_commands(run),
        "failures": [stage for stage in run.stages if stage.error],
        "versions": _versions(run),
    }


def _timeline(run: RunReport) -> dict[str, Any]:
    longest = max((stage.seconds or 0 for stage in run.stages), default=0)
    spent = sum(stage.seconds or 0 for stage in run.stages if stage.status == "run")
    saved = sum(stage.seconds or 0 for stage in run.stages if stage.status == "reused")
    rows = [
        {"stage": stage, "width": 100 * (stage.seconds or 0) / longest if longest else 0, "rss": stage.peak_rss_mib}
        for stage in run.stages
    ]
    reused = sum(stage.status == "reused" for stage in run.stages)
    return {"rows": rows, "spent": spent, "saved": saved, "reused": reused}


def _curve(stage: StageReport, identifier: str) -> dict[str, Any]:
    steps, losses = stage.curve()
    logged = {row["step"] for row in stage.metrics if "step" in row and row.get("loss") is not None}
    return {
        "stage": stage,
        "svg": Markup(loss_svg(steps, losses, identifier)),
        "first": losses[0],
        "last": losses[-1],
        "steps": steps[-1],
        "speed": speed_words(stage),
        "verified": verified_words(stage) if stage.kind == TRAIN else "",
        "certificate": None if stage.certificate is None else stage.certificate.path.resolve().as_uri(),
        "non_finite": len(logged) - len(steps),
    }


def _scores(run: RunReport) -> dict[str, Any]:
    stages = run.scored_stages
    rows = run.score_rows()
    shares = all(row.last.is_share for row in rows)
    shown = [_score_row(run, row, _top(rows, row)) for row in rows]
    names = list(dict.fromkeys(row.name for row in rows))
    groups = [{"name": name, "rows": [one for one in shown if one["name"] == name]} for name in names]
    return {
        "stages": stages,
        "blind": any(score.blind is not None for row in rows for score in row.by_stage.values()),
        "chance": any(row.last.chance is not None for row in rows),
        "rows": [group["rows"][0] for group in groups] if len(groups) > 1 else shown,
        "groups": groups if len(groups) > 1 else [],
        "intervals": any(row.last.interval() for row in rows),
        "protocols": dict(zip(("header", "rows"), protocol_grid(run), strict=True)),
        "shares": shares,
    }


def _score_row(run: RunReport, row: ScoreRow, top: float) -> dict[str, Any]:
    stages = run.scored_stages
    return {
        "name": row.name,
        "label": _label(run, row),
        "overall": row.last.overall,
        "by_stage": [row.by_stage.get(stage) for stage in stages],
        "gain": _gain(row.by_stage, stages),
        "last": row.last,
        "bars": _bars(row.by_stage, stages, top),
        "chance_at": _place(row.last.chance, top),
        "low_high": span(row.last.interval()),
        "interval": [_place(end, top) for end in row.last.interval() or ()],
    }


def _top(rows: Sequence[ScoreRow], row: ScoreRow) -> float:
    """The end of a metric's scale; where that is not known 100, or its evaluation's largest value where that is more."""
    if row.last.top is not None:
        return row.last.top
    values = [score.value for other in rows if other.name == row.name for score in other.by_stage.values()]
    return max([*values, 100.0])


def _label(run: RunReport, row: ScoreRow) -> str:
    """The row's name; accuracy over all questions is called that, as the table's head says accuracy already."""
    label = row_label(run, row)
    return label.replace("accuracy", "all questions", 1) if row.metric == "accuracy" else label


def _gain(by_stage: dict[str, Score], stages: list[str]) -> float | None:
    """What the last stage added to the one before it."""
    if len(stages) < 2 or not {stages[-1], stages[-2]} <= by_stage.keys():
        return None
    return by_stage[stages[-1]].value - by_stage[stages[-2]].value


def _bars(by_stage: dict[str, Score], stages: list[str], top: float) -> list[dict[str, Any]]:
    """Last stage first, then earlier ones, then blind: the order of interest."""
    bars = [
        {
            "role": "last" if stage == stages[-1] else "earlier",
            "label": f"after {stage}",
            "value": by_stage[stage].value,
        }
        for stage in reversed(stages)
        if stage in by_stage
    ]
    blind = list(by_stage.values())[-1].blind
    if blind is not None:
        bars.append({"role": "blind", "label": "blind", "value": blind})
    return [bar | {"width": _place(float(bar["value"]), top)} for bar in bars]


def _place(value: float | None, top: float) -> float | None:
    """Where a value lies on a bar's track, in % of its length."""
    return None if value is None else round(min(max(100 * value / top, 0.0), 100.0), 2)


def _total(run: RunReport, name: str) -> Score | None:
    return next((row.last for row in run.score_rows() if row.name == name and row.last.overall), None)


def _card(example: Example) -> dict[str, Any]:
    try:
        return {"example": example, "image": thumbnail(example.image), "missing": ""}
    except ThumbnailError as reason:
        return {"example": example, "image": None, "missing": str(reason)}


def _locations(run: RunReport) -> list[tuple[str, str]]:
    rows = [("Run", str(run.record.folder))]
    rows += [(f"Model after {stage}", str(folder)) for stage, folder in run.models.items()]
    rows += [(f"Answers, {words(e.name)} after {e.stage}", str(e.generations)) for e in run.evaluations]
    rows += [(f"Upload, {words(e.name)} after {e.stage}", str(e.upload)) for e in run.evaluations if e.upload]
    return rows


def _versions(run: RunReport) -> list[tuple[str, str]]:
    record = run.record
    rows = [(name, str(value)) for name, value in record.versions.items() if value]
    times = [("started", moment(record.created)), ("finished", moment(record.finished))]
    return [*rows, ("host", record.host), *times]
