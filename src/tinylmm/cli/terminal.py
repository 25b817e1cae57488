"""What reaches the terminal: text from data, models and other people's files is shown, and never obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderableType, RenderHook
from rich.segment import Segment
from rich.text import Span, Text

from tinylmm.errors import printable


def terminal(stderr: bool = False, highlight: bool = True) -> Console:
    """Return a console that writes escape codes and direction marks out, other than those of its own styles.

    Strings are text: `[red]` in them is a name or a path, no markup. What is to have a style is a `rich.text.Text`.
    """
    console = _Console(stderr=stderr, highlight=highlight, markup=False)
    console.push_render_hook(_Escaping())
    return console


def echo(text: str, err: bool = False) -> None:
    """Write a line as `terminal` would, without styles."""
    typer.echo(printable(text), err=err)


def echo_json(record: Any) -> None:
    """Write JSON with every character that a terminal would obey as JSON's own escape."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    typer.echo("".join(c if c == "\n" or printable(c, keep="") == c else json.dumps(c)[1:-1] for c in text))


class _Console(Console):
    """Lays text out as it is written: to rich, what a terminal would obey has no width; lines that grow later are cropped."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        if isinstance(renderable, str):
            renderable = printable(renderable)
        elif isinstance(renderable, Text):
            renderable = _escaped(renderable)
        return super().render(renderable, options)


def _escaped(text: Text) -> Text:
    """A text with everything written out, each style where it was."""
    if printable(text.plain) == text.plain:
        return text
    pieces = [printable(character) for character in text.plain]
    starts = [0, *accumulate(map(len, pieces))]
    written = text.blank_copy("".join(pieces))
    written.spans = [Span(starts[span.start], starts[min(span.end, len(pieces))], span.style) for span in text.spans]
    return written


class _Escaping(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Escaped(renderable) for renderable in renderables]


class _Escaped:
    """A renderable whose text is escaped when its layout and styles are known already."""

    def __init__(self, renderable: ConsoleRenderable) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
