"""Draw docs/architecture.svg: the rooms of src/tinylmm and the imports between them, read from the code itself.

    python docs/architecture.py

An arrow says that some module of the upper room imports one of the lower; arrows that follow from others are left out.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/tinylmm"
PICTURE = ROOT / "docs/architecture.svg"
WIDTH, BOX, GAP, MARGIN = 1120, 88, 46, 24
ROWS = (
    ("", "", "cli"),
    ("verification", "demo", ""),
    ("launch", "reports", ""),
    ("stages", "", "serving"),
    ("training", "planning", "evaluation", "generation", "convert"),
    ("data", "models"),
    ("config",),
    ("sizing", "store"),
)
"""Where rooms stand in the picture ("" is an empty place); what points where is the code's."""
FONT = "font-family='system-ui, sans-serif'"


def modules() -> dict[str, Path]:
    """Dotted name below `tinylmm` -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of ours that a module imports anywhere in it, also inside functions; not those for type checkers alone."""
    known = modules()
    found: set[str] = set()
    for node in _nodes(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinylmm":
            base = node.module.removeprefix("tinylmm").removeprefix(".")
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {one if one in known else base for one in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("tinylmm.") for alias in node.names if alias.name.startswith("tinylmm.")}
    return frozenset(found - {name})


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _nodes(node)


def rooms() -> dict[str, set[str]]:
    """Room -> rooms that its modules import; the ground is left out."""
    found: dict[str, set[str]] = {path.name: set() for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    for name in modules():
        room = name.partition(".")[0]
        if room in found:
            found[room] |= {other.partition(".")[0] for other in imports(name)} & found.keys() - {room}
    return found


def purpose(room: str) -> str:
    """First line of the docstring in a room's `__init__.py`."""
    return (ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8"))) or "").split(
        "\n"
    )[0]


def direct(graph: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The arrows that do not follow from others."""

    def below(room: str) -> set[str]:
        return graph[room].union(*map(below, graph[room]))

    arrows = []
    for room, others in graph.items():
        further = set().union(*map(below, others)) if others else set()
        arrows += [(room, other) for other in sorted(others - further)]
    return sorted(arrows)


def draw() -> str:
    """The picture as SVG, the same for the same code.

    Raises:
        ValueError: a room has no place in `ROWS`.
    """
    graph = rooms()
    places = _places()
    if graph.keys() != places.keys():
        raise ValueError(f"give these rooms a place in ROWS, or take it away: {sorted(graph.keys() ^ places.keys())}")
    total = MARGIN * 2 + len(ROWS) * (BOX + GAP)
    lines = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {total}' width='{WIDTH}' height='{total}'>",
        "<defs><marker id='tip' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 8 4 0 8z' fill='#7b8794'/></marker></defs>",
        f"<rect width='{WIDTH}' height='{total}' fill='#ffffff'/>",
        *(_arrow(places[upper], places[lower]) for upper, lower in direct(graph)),
        *(_box(room, *places[room]) for room in sorted(places)),
        f"<text x='{WIDTH / 2:.0f}' y='{total - MARGIN}' text-anchor='middle' font-size='14' fill='#52606d' {FONT}>"
        f"Below all of them: {', '.join(_ground())}</text>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _places() -> dict[str, tuple[float, float, float]]:
    """Room -> left, top and width of its box."""
    places = {}
    for level, row in enumerate(ROWS):
        width = min(330.0, (WIDTH - MARGIN * (len(row) + 1)) / len(row))
        left = (WIDTH - width * len(row) - MARGIN * (len(row) - 1)) / 2
        for number, room in ((number, room) for number, room in enumerate(row) if room):
            places[room] = (left + number * (width + MARGIN), float(MARGIN + level * (BOX + GAP)), width)
    return places


def _ground() -> list[str]:
    return sorted(path.name for path in SOURCE.glob("*.py") if path.name != "__init__.py")


def _arrow(upper: tuple[float, float, float], lower: tuple[float, float, float]) -> str:
    """From the lower edge of a box to the upper edge of another, or straight to its neighbour in the row."""
    if upper[1] == lower[1]:
        middle = upper[1] + BOX / 2
        path = f"M{upper[0] + upper[2]:.0f} {middle:.0f} L{lower[0] - 1:.0f} {middle:.0f}"
    else:
        x1, y1, x2, y2 = upper[0] + upper[2] / 2, upper[1] + BOX, lower[0] + lower[2] / 2, lower[1]
        bend = (y2 - y1) / 2
        path = f"M{x1:.0f} {y1:.0f} C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2 - 1:.0f}"
    return f"<path d='{path}' fill='none' stroke='#9aa5b1' stroke-width='1.4' marker-end='url(#tip)'/>"


def _box(room: str, x: float, y: float, width: float) -> str:
    words = [
        f"<text x='{x + 12:.0f}' y='{y + 42 + 15 * number:.0f}' font-size='12' fill='#52606d' {FONT}>{escape(line)}</text>"
        for number, line in enumerate(_wrapped(purpose(room), int(width / 7.1)))
    ]
    return (
        f"<rect x='{x:.0f}' y='{y:.0f}' width='{width:.0f}' height='{BOX}' rx='6' fill='#f5f7fa' stroke='#cbd2d9'/>"
        f"<text x='{x + 12:.0f}' y='{y + 23:.0f}' font-size='15' font-weight='600' fill='#1f2933' {FONT}>{room}/</text>"
        + "".join(words)
    )


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"{PICTURE}\n")
