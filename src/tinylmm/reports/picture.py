"""One PNG that sums a run up for a README: held-out questions on the left, accuracy per question type on the right."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinylmm.errors import UserError
from tinylmm.reports.records import Example, Report, RunReport, ScoreRow
from tinylmm.reports.thumbnails import SMALL_SIDE, ThumbnailError, load_image
from tinylmm.reports.wording import words
from tinylmm.store.integrity import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 1600, 700, 100
INK, MUTED, LINE, ACCENT, SOFT, BLIND, WRONG = (
    "#1c1e21",
    "#5c636b",
    "#e2e2dd",
    "#1558a6",
    "#9dbfe4",
    "#b4b7b9",
    "#a8331d",
)
MARKS = {True: ("✓", ACCENT), False: ("✗", WRONG), None: ("·", MUTED)}
"""Of answers that are right, wrong, and neither."""
COLUMNS, ROWS = 3, 2
LINE_CHARS, LABEL_CHARS = 28, 18
"""What fits under an image at 10.5 points and beside a bar at 11, in letters of usual width; wider ones are clipped."""
MAX_ROWS = 9
"""Question types that fit into the chart's height with readable labels."""
LEGEND: dict[str, Any] = {
    "loc": "lower right",
    "bbox_to_anchor": (1.0, 1.0),
    "ncols": 4,
    "frameon": False,
    "fontsize": 10.5,
    "handlelength": 1.2,
    "columnspacing": 1.4,
    "handletextpad": 0.5,
}
"""Above the chart, over labels and bars alike."""


def results_picture(report: Report, path: Path) -> None:
    """Write a 1600 x 700 pixel PNG of one run's results.

    Raises:
        UserError: several runs, a run with no scores, or `path` does not end in .png.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"--picture {path}: the picture is a PNG; let the name end in .png")
    if len(report.runs) != 1:
        raise UserError(f"--picture shows one run, {len(report.runs)} were given: {report.name}. Name one of them.")
    run = report.runs[0]
    if run.headline is None:
        raise UserError(f"--picture: run '{run.name}' has no scores yet. Choose a run whose evaluation has finished.")

    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.family": ["DejaVu Sans"], "font.size": 11, "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        _draw_examples(figure, _picked(run))
        _draw_scores(figure, run)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _picked(run: RunReport) -> list[Example]:
    """Up to six examples that have an image, over all question types, with right and wrong as in the score itself.

    The last places are the wrong ones': as many as the score over all questions says, one at least where there is any.
    """
    assert run.headline is not None, "results_picture refuses a run without scores"
    score = run.headline[1]
    shown = [e for e in run.examples.get(score.title, ()) if e.image and e.image.path.is_file()]
    places = min(COLUMNS * ROWS, len(shown))
    share = score.value / 100 if score.is_share else 0.5
    wrong = max(1, round(places * (1 - share)))
    picked: list[Example] = []
    for place in range(places):
        seen = [example.category for example in picked]
        right_wanted = place < places - wrong
        left = [example for example in shown if example not in picked]
        # the wanted side first, then the question type that has been shown least
        picked.append(min(left, key=lambda e: (e.answer.correct != right_wanted, seen.count(e.category))))
    return picked


def _draw_examples(figure: Figure, examples: list[Example]) -> None:
    from matplotlib.transforms import Bbox, TransformedBbox

    figure.text(0.02, 0.955, "Held-out questions", fontsize=15, fontweight="bold", color=INK, va="center")
    for index, example in enumerate(examples):
        left = 0.02 + (index % COLUMNS) * 0.16
        top = 0.9 - (index // COLUMNS) * 0.455
        side = 0.27  # of the figure's height; the width follows from the picture's shape
        axes = figure.add_axes((left, top - side, side * HEIGHT / WIDTH, side))
        axes.set_axis_off()
        try:
            image = load_image(example.image)
        except ThumbnailError as reason:
            axes.text(0.5, 0.5, "\n".join(_wrapped(str(reason), 5)), ha="center", va="center", color=MUTED)
        else:
            crisp = max(image.size) <= SMALL_SIDE
            axes.imshow(image, interpolation="nearest" if crisp else "antialiased")
        lines = [(line, INK, "normal") for line in _wrapped(example.question, 3)]
        mark, colour = MARKS[example.answer.correct]
        lines += [
            (line, colour, "bold") for line in [_cut(f"{mark} {_line(example.answer.text) or '(empty)'}", LINE_CHARS)]
        ]
        if not example.answer.correct or not example.answer.literal(example.truth):
            lines += [(line, MUTED, "normal") for line in [_cut(f"truth: {_line(example.truth)}", LINE_CHARS)]]
        for number, (line, colour, weight) in enumerate(lines):
            height = top - side - 0.03 - number * 0.032
            text = figure.text(left, height, line, fontsize=10.5, color=colour, fontweight=weight, va="center")
            text.set_clip_on(True)
            text.set_clip_box(TransformedBbox(Bbox.from_bounds(left, 0, 0.155, 1), figure.transFigure))


def _wrapped(text: str, lines: int) -> list[str]:
    """At most `lines` lines of `LINE_CHARS`; what does not fit ends in an ellipsis."""
    wrapped = textwrap.wrap(_line(text), LINE_CHARS) or [""]
    return (
        wrapped if len(wrapped) <= lines else [*wrapped[: lines - 1], _cut(" ".join(wrapped[lines - 1 :]), LINE_CHARS)]
    )


def _line(text: str) -> str:
    return " ".join(text.split())


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[: characters - 1]}…"


def _draw_scores(figure: Figure, run: RunReport) -> None:
    assert run.headline is not None, "results_picture refuses a run without scores"
    headline = run.headline[1]
    family = headline.metric
    found = [r for r in run.score_rows() if r.name == headline.title and _is_of(r.metric, family)]
    rows, stages = found[:MAX_ROWS], run.scored_stages
    # a chart that leaves types out says so
    part = f" (first {len(rows) - 1} of {len(found) - 1})" if len(found) > len(rows) else ""
    sample = f" ({headline.mark})" if headline.mark else ""
    title = f"{words(family).capitalize()} by question type{part}, %{sample}"
    figure.text(0.535, 0.955, title, fontsize=15, fontweight="bold", color=INK, va="center")
    axes = figure.add_axes((0.665, 0.07, 0.315, 0.76))
    series: list[tuple[str, str, list[float | None]]] = [
        (f"after {stage}", ACCENT if stage == stages[-1] else SOFT, [_value(row, stage) for row in rows])
        for stage in reversed(stages)
    ]
    series.append(("without the image", BLIND, [row.last.blind for row in rows]))
    series = [entry for entry in series if any(value is not None for value in entry[2])]
    height = 0.8 / len(series)
    for place, (label, colour, values) in enumerate(series):
        where = [index - 0.4 + (place + 0.5) * height for index in range(len(rows))]
        axes.barh(where, [value or 0 for value in values], height * 0.88, color=colour, label=label)
        for y, value in zip(where, values, strict=True):
            if value is not None:
                bold = "bold" if place == 0 else "normal"
                axes.text(
                    value + 1,
                    y,
                    f"{value:.0f}",
                    va="center",
                    fontsize=9.5,
                    color=INK if place == 0 else MUTED,
                    fontweight=bold,
                )
    labelled = False
    for index, row in enumerate(rows):
        if row.last.chance is not None:
            axes.plot(
                [row.last.chance] * 2,
                [index - 0.42, index + 0.42],
                color=INK,
                linewidth=1.6,
                label=None if labelled else "chance",
            )
            labelled = True
    _finish_axes(axes, [_label(run, row) for row in rows])
    handles, labels = axes.get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda index: labels[index] == "chance")
    axes.legend([handles[index] for index in order], [labels[index] for index in order], **LEGEND)


def _is_of(metric: str, family: str) -> bool:
    """Whether a metric is the headline's, of all questions or of a category: `accuracy/digit`, POPE's `random/f1`."""
    return family in (metric, metric.partition("/")[0], metric.rpartition("/")[2])


def _value(row: ScoreRow, stage: str) -> float | None:
    return row.by_stage[stage].value if stage in row.by_stage else None


def _label(run: RunReport, row: ScoreRow) -> str:
    name = "all questions" if row.last.overall else words(row.last.label)
    return f"{_cut(name, LABEL_CHARS)}  ({row.last.count:,})"


def _finish_axes(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(max(len(labels), 4) - 0.5, -0.5)  # few bars stay slim
    axes.set_xlim(0, 106)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(LINE)
    axes.tick_params(length=0, colors=MUTED)
    for number, label in enumerate(axes.get_yticklabels()):
        label.set_color(INK)
        label.set_fontweight("bold" if number == 0 else "normal")
