"""Draws the stage graph of a run or a sweep (`tinylmm plan --graph FILE`). matplotlib is imported at use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tinylmm.errors import UserError, printable
from tinylmm.store.disk import writing

FORMATS = ("svg", "png", "pdf")
COLUMN_INCHES, ROW_INCHES = 2.3, 0.34
BOX_INCHES = (1.75, 0.24)
MOST_INCHES = 200.0
"""Of a side; what is larger is drawn to a smaller scale, as no viewer opens it otherwise."""
COLOURS = {"complete": "#d5ecd8", "todo": "#fbe7c1", "waits": "#e3e3e8"}
NAME_LETTERS = 30


def check_format(path: Path) -> None:
    """Refuse a file whose ending says no format that can be written, or whose folder is not there.

    Raises:
        UserError: it is such a file.
    """
    if path.suffix.lower().lstrip(".") not in FORMATS:
        raise UserError(
            f"--graph {path}: its ending says no format that can be drawn; end it in .{', .'.join(FORMATS)}"
        )
    if not path.parent.is_dir():
        raise UserError(f"--graph {path}: there is no folder {path.parent}. Make it first, or name another.")


def places(stages: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, float]]:
    """Digest -> (column, row): a stage stands right of all its parents, and near to them.

    Args:
        stages: of `plan_record`, each after its parents.
    """
    column: dict[str, int] = {}
    columns: dict[int, list[Mapping[str, Any]]] = {}
    for stage in stages:
        parents = [parent for parent in stage["parents"] if parent in column]
        column[stage["digest"]] = 1 + max((column[parent] for parent in parents), default=-1)
        columns.setdefault(column[stage["digest"]], []).append(stage)
    found: dict[str, tuple[int, float]] = {}
    most = max(map(len, columns.values()), default=0)
    for number, members in sorted(columns.items()):
        rows = {}
        for order, stage in enumerate(members):
            above = [found[parent][1] for parent in stage["parents"] if parent in found]
            rows[stage["digest"]] = sum(above) / len(above) if above else float(order)
        members.sort(key=lambda stage: rows[stage["digest"]])
        for order, stage in enumerate(members):  # spread over the whole height, so that columns of any length line up
            found[stage["digest"]] = (number, (order + 0.5) * most / len(members))
    return found


def direct_parents(stages: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Digest -> parents that are not behind another parent as well: the arrows that say all.

    Args:
        stages: of `plan_record`, each after its parents.
    """
    number = {stage["digest"]: n for n, stage in enumerate(stages)}
    above: dict[str, int] = {}
    found = {}
    for stage in stages:
        parents = [parent for parent in stage["parents"] if parent in above]
        further = 0
        for parent in parents:
            further |= above[parent]
        found[stage["digest"]] = [parent for parent in parents if not further >> number[parent] & 1]
        above[stage["digest"]] = further | sum(1 << number[parent] for parent in parents)
    return found


def draw_graph(record: Mapping[str, Any], path: Path) -> None:
    """Draw every distinct stage of a plan with its direct parents: green is complete, yellow to do, grey waits for the user.

    Args:
        record: of `plan_record`.
        path: file to write; its ending is one of FORMATS.

    Raises:
        UserError: it is not.
        DiskError: the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    check_format(path)
    stages = record["stages"]
    place = places(stages)
    wide = 1 + max((column for column, _ in place.values()), default=0)
    high = 1 + max((row for _, row in place.values()), default=0.0)
    scale = min(1.0, MOST_INCHES / (wide * COLUMN_INCHES), MOST_INCHES / (high * ROW_INCHES))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "tinylmm", "text.parse_math": False}):
        figure = Figure(figsize=(wide * COLUMN_INCHES * scale, high * ROW_INCHES * scale))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, wide * COLUMN_INCHES), ylim=(high * ROW_INCHES, 0))
        axes.axis("off")
        for stage, parents in zip(stages, direct_parents(stages).values(), strict=True):
            _draw(axes, stage, parents, place, scale)
        with writing(path):
            figure.savefig(path, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)


def _draw(
    axes: Any, stage: Mapping[str, Any], parents: Sequence[str], place: Mapping[str, tuple[int, float]], scale: float
) -> None:
    from matplotlib.patches import FancyBboxPatch

    left, middle = _point(place[stage["digest"]])
    width, height = BOX_INCHES
    for x, y in (_point(place[parent]) for parent in parents):
        axes.plot([x + width, left], [y, middle], color="#9a9aa2", linewidth=0.6 * scale, zorder=1)
    box = FancyBboxPatch(
        (left, middle - height / 2),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.05",
        facecolor=COLOURS[stage["status"]],
        edgecolor="#55555c",
        linewidth=0.6 * scale,
        zorder=2,
    )
    axes.add_patch(box)
    name = printable(f"{stage['kind']} {stage['name']}", keep="")
    name = name if len(name) <= NAME_LETTERS else f"{name[: NAME_LETTERS - 1]}…"
    axes.text(left + width / 2, middle, name, ha="center", va="center", fontsize=7 * scale, zorder=3)


def _point(place: tuple[int, float]) -> tuple[float, float]:
    """Left edge and middle of a box, inches."""
    column, row = place
    return column * COLUMN_INCHES + (COLUMN_INCHES - BOX_INCHES[0]) / 2, (row + 0.5) * ROW_INCHES
