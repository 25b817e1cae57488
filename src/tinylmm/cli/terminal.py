"""What reaches the terminal: text from data, models and other people's files is shown, and never obeyed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import typer
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from tinylmm.errors import printable


def terminal(stderr: bool = False, highlight: bool = True) -> Console:
    """Return a console that writes escape codes and direction marks out, other than those of its own styles.

    Strings are text: `[red]` in them is a name or a path, no markup. What is to have a style is a `rich.text.Text`.
    """
    console = Console(stderr=stderr, highlight=highlight, markup=False)
    console.push_render_hook(_Escaping())
    return console


def echo(text: str, err: bool = False) -> None:
    """Write a line as `terminal` would, without styles."""
    typer.echo(printable(text), err=err)


def echo_json(record: Any) -> None:
    """Write JSON with every character that a terminal would obey as JSON's own escape."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    typer.echo("".join(c if c == "\n" or printable(c, keep="") == c else json.dumps(c)[1:-1] for c in text))


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
