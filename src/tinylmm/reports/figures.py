"""Figures of a study: bars by factor, a radar, and cost against score. For the page as SVG, for a paper as PDF. No torch.

What users named (levels, benchmarks) is text in them and nothing else: no formula is read in it, and matplotlib escapes it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, pi
from typing import TYPE_CHECKING, Any
from unicodedata import east_asian_width

from tinylmm.errors import printable
from tinylmm.reports.doubt import Estimate, mean_over
from tinylmm.reports.effects import Findings
from tinylmm.reports.factors import Factor
from tinylmm.reports.plots import INK, LINE, svg_for_page
from tinylmm.reports.study import Column, Study
from tinylmm.reports.study_tables import pareto_front

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = ("#2e75c6", "#d9822b", "#3f9a6b", "#9a5bb0", "#c9485b", "#7d858c")
"""Told apart in light and dark and, with their markers, without colour."""
MARKERS = "osD^vP"
PANELS_A_ROW = 4
MAX_CONTEXTS = 8
"""Groups of bars that fit beside each other; of more, the mean over them is shown alone."""
MAX_RADAR_CELLS = 5
LABEL_CHARS = 22
MEAN = "mean over all"


@dataclass(frozen=True)
class Inks:
    """Colours of words and of lines."""

    words: str
    lines: str


PAGE, PAPER = Inks(INK, LINE), Inks("#1c1e21", "#d5d5d0")


@dataclass(frozen=True)
class Picture:
    """A figure with the name of its file, and what it shows in words."""

    name: str
    title: str
    caption: str
    draw: Callable[[Inks], Figure]


def study_pictures(findings: Findings) -> list[Picture]:
    """The figures that a study has enough of."""
    study = findings.study
    return [*_bar_pictures(study), *_radar_picture(study), *_cost_picture(study)]


def picture_svg(picture: Picture, identifier: str) -> str:
    """A figure for the page, in the page's colours."""
    return svg_for_page(_drawn(picture, "svg", identifier).decode(), identifier)


def picture_pdf(picture: Picture) -> bytes:
    """A figure for a paper, the same bytes every time."""
    return _drawn(picture, "pdf", picture.name)


def _drawn(picture: Picture, kind: str, salt: str) -> bytes:
    from matplotlib import rc_context

    style: dict[str, Any] = {"svg.fonttype": "none", "svg.hashsalt": salt, "pdf.fonttype": 42, "font.size": 8}
    with rc_context({**style, "axes.linewidth": 0.8, "text.parse_math": False, "font.family": ["DejaVu Sans"]}):
        figure = picture.draw(PAGE if kind == "svg" else PAPER)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"CreationDate": None, "Creator": None}
        with warnings.catch_warnings():
            if kind == "svg":  # its words are drawn by the browser, whose fonts are others
                warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(buffer, format=kind, transparent=True, metadata=metadata)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(text: str, width: int = LABEL_CHARS) -> str:
    """At most so many columns of text; characters of East Asian scripts take two."""
    text = printable(" ".join(text.split()))
    columns = 0
    for place, character in enumerate(text):
        columns += 2 if east_asian_width(character) in "WF" else 1
        if columns > width:
            return f"{text[: max(place - 1, 1)]}…"
    return text


def _plain_axes(axes: Axes, inks: Inks) -> None:
    axes.grid(axis="y", color=inks.lines, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(inks.lines)
    axes.tick_params(colors=inks.words, length=0, labelsize=8)


# ---------------------------------------------------------------------------------------------------- bars by factor


@dataclass(frozen=True)
class _Group:
    """Bars beside each other: a label, and an estimate a level."""

    label: str
    bars: tuple[Estimate, ...]


def _bar_pictures(study: Study) -> Iterator[Picture]:
    for place, factor in enumerate(study.factors.varying):
        panels = [(column, _groups(study, column, place, factor)) for column in study.columns]
        panels = [(column, groups) for column, groups in panels if groups]
        if panels:
            caption = (
                f"Mean over seeds for each {factor.title}, in cells that differ in nothing else; whiskers are 95 % intervals "
                "over seeds and questions."
            )
            name = f"bars-{''.join(c if c.isalnum() else '-' for c in factor.title.lower())}"
            yield Picture(name, f"By {factor.title}", caption, _bar_drawer(factor, panels))


def _groups(study: Study, column: Column, place: int, factor: Factor) -> list[_Group]:
    """One group a context that has every level, then their mean; the mean alone where there are many columns or contexts."""
    contexts: dict[tuple[str, ...], dict[str, int]] = {}
    for cell in column.cells:
        levels = study.cells[cell].levels
        contexts.setdefault((*levels[:place], *levels[place + 1 :]), {})[levels[place]] = cell
    whole = {context: cells for context, cells in contexts.items() if len(cells) == len(factor.levels)}
    if not whole:
        return []
    telling = [index for index in range(len(next(iter(whole)))) if len({context[index] for context in whole}) > 1]
    groups = []
    if 1 < len(whole) <= MAX_CONTEXTS and len(study.columns) < 3:
        for context, cells in whole.items():
            bars = tuple(column.means[cells[level]] for level in factor.levels)
            groups.append(_Group("\n".join(_short(context[index], 14) for index in telling), bars))
    means = tuple(mean_over(column.runs, [cells[level] for cells in whole.values()]) for level in factor.levels)
    return [*groups, _Group(MEAN if len(whole) > 1 else "", means)]


def _bar_drawer(factor: Factor, panels: Sequence[tuple[Column, list[_Group]]]) -> Callable[[Inks], Figure]:
    def draw(inks: Inks) -> Figure:
        from matplotlib.patches import Patch

        across = min(len(panels), PANELS_A_ROW)
        down = ceil(len(panels) / across)
        figure = _figure(7.2, 0.5 + 2.2 * down)
        for number, (column, groups) in enumerate(panels):
            axes = figure.add_subplot(down, across, number + 1)
            _draw_bars(axes, inks, groups, len(factor.levels))
            if across == 1:  # a single group's bars would be walls
                axes.set_xlim(-0.5, max(len(groups) - 0.5, 2.5))
            axes.set_title(_short(column.title, 34), color=inks.words, fontsize=8, loc="left")
        handles = [
            Patch(color=SERIES[index % len(SERIES)], label=_short(level)) for index, level in enumerate(factor.levels)
        ]
        figure.legend(
            handles=handles,
            loc="outside upper left",
            ncols=min(len(handles), 5),
            frameon=False,
            labelcolor=inks.words,
            handlelength=1.0,
        )
        return figure

    return draw


def _draw_bars(axes: Axes, inks: Inks, groups: Sequence[_Group], levels: int) -> None:
    width = 0.8 / levels
    for place, group in enumerate(groups):
        for index, bar in enumerate(group.bars):
            at = place + (index - (levels - 1) / 2) * width
            axes.bar(at, bar.value, 0.9 * width, color=SERIES[index % len(SERIES)])
            axes.plot([at, at], list(bar.interval), color=inks.words, linewidth=1.0)
            axes.annotate(
                f"{bar.value:.1f}", (at, max(bar.interval)), (0, 2), textcoords="offset points", ha="center", color=inks.words,
                fontsize=7,
            )  # fmt: skip
    _plain_axes(axes, inks)
    axes.set_xticks(range(len(groups)), [group.label for group in groups])
    axes.margins(x=0.02)
    axes.set_ylim(0, 1.15 * max(max(bar.interval) for group in groups for bar in group.bars) or 1.0)


# ---------------------------------------------------------------------------------------------------- radar


def _radar_picture(study: Study) -> Iterator[Picture]:
    columns = study.columns if len(study.columns) >= 3 else study.categories
    if not study.columns:
        return
    shown = list(study.columns[0].order[:MAX_RADAR_CELLS])
    axes = [column for column in columns if set(shown) <= set(column.cells)]
    if len(axes) < 3 or len(shown) < 2:
        return
    what = "benchmarks" if columns is study.columns else "categories of questions"
    caption = (
        f"The {len(shown)} best cells over {what}; each axis goes from 0 to the best of them, as written at its end."
    )
    yield Picture("radar", "At a glance", caption, lambda inks: _draw_radar(inks, study, axes, shown))


def _draw_radar(inks: Inks, study: Study, columns: Sequence[Column], cells: Sequence[int]) -> Figure:
    figure = _figure(6.4, 4.8)
    axes: Any = figure.add_subplot(projection="polar")
    angles = [2 * pi * index / len(columns) for index in range(len(columns))]
    best = [max(column.means[cell].value for cell in cells) for column in columns]
    for index, cell in enumerate(cells):
        values = [column.means[cell].value / top if top else 0.0 for column, top in zip(columns, best, strict=True)]
        colour, marker = SERIES[index % len(SERIES)], MARKERS[index % len(MARKERS)]
        axes.plot(
            [*angles, angles[0]], [*values, values[0]], color=colour, marker=marker, markersize=3, linewidth=1.3,
            label=_short(study.label(cell), 40),
        )  # fmt: skip
    names = [_radar_label(column) for column in columns]
    axes.set_xticks(angles, [f"{_short(n)}\n{top:.1f}" for n, top in zip(names, best, strict=True)], color=inks.words)
    axes.set_theta_offset(pi / 2)
    axes.set_theta_direction(-1)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.grid(color=inks.lines, linewidth=0.8)
    axes.spines["polar"].set_color(inks.lines)
    axes.tick_params(pad=8)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, labelcolor=inks.words)
    return figure


def _radar_label(column: Column) -> str:
    group, _, category = column.metric.partition("/")
    return category.replace("_", " ") if group == "accuracy" and category else column.title


# ---------------------------------------------------------------------------------------------------- cost


def _cost_picture(study: Study) -> Iterator[Picture]:
    if not study.columns:
        return
    column = study.columns[0]
    timed = {cell: seconds for cell in column.cells if (seconds := study.training_seconds(cell))}
    if len(timed) < 2:
        return
    caption = (
        "What the trainings of one model took, against its score; numbers are those of the table below. The line is the "
        "Pareto front: no other cell trains faster and scores as well."
    )
    yield Picture("cost", "Cost against score", caption, lambda inks: _draw_cost(inks, study, column, timed))


def _draw_cost(inks: Inks, study: Study, column: Column, timed: dict[int, float]) -> Figure:
    longest = max(timed.values())
    unit, name = (3600.0, "h") if longest > 7200 else (60.0, "min") if longest > 120 else (1.0, "s")
    figure = _figure(6.4, 3.4)
    axes = figure.add_subplot()
    front = [cell for cell in pareto_front(study) if cell in timed]
    axes.step(
        [timed[cell] / unit for cell in front],
        [column.means[cell].value for cell in front],
        where="post",
        color=SERIES[0],
        linewidth=1.2,
        zorder=3,
    )
    for cell, seconds in timed.items():
        found = column.means[cell]
        axes.plot([seconds / unit] * 2, list(found.interval), color=inks.lines, linewidth=1.4)
        colour = SERIES[0] if cell in front else SERIES[-1]
        axes.plot(
            seconds / unit, found.value, marker="o" if cell in front else "s", markersize=5, color=colour, zorder=4
        )
        axes.annotate(
            str(cell + 1),
            (seconds / unit, found.value),
            (5, 3),
            textcoords="offset points",
            color=inks.words,
            fontsize=8,
        )
    _plain_axes(axes, inks)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"training of one model in {name}", color=inks.words)
    axes.set_ylabel(_short(column.title, 40), color=inks.words)
    return figure
