"""Text from data is shown in the terminal and never obeyed: escape codes, direction marks, halves of characters."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table
from rich.text import Text

import tinylmm
from tests.integration.project import tiny_project
from tinylmm.cli import main
from tinylmm.cli.errors import guarded
from tinylmm.cli.terminal import echo, echo_json, terminal
from tinylmm.errors import UserError, printable

HOSTILE = "\x1b[2J\x1b]0;title\x07\u202egnp\x9b31m"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e")


def obeyed(text: str) -> list[str]:
    return [repr(character) for character in OBEYED if character in text]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 数据 \U0001f468\u200d\U0001f469", "plain é 数据 \U0001f468\u200d\U0001f469"),
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\u202eab\u2066", r"\u202eab\u2066"),
        ("\ud83d", r"\ud83d"),
        ("a\rb\u2028", r"a\rb\u2028"),
    ],
    ids=["text-stays", "lines-stay", "colour", "direction", "half", "line-ends"],
)
def test_what_a_terminal_obeys_is_written_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_console_keeps_its_own_styles_and_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    table = Table("name")
    table.add_row(Text(HOSTILE))
    terminal().print(Text("a\x1b[2J", "bold red"), table, f"[green]{HOSTILE}[/green]")
    shown = capsys.readouterr().out
    assert "\x1b[1;31ma\\x1b[2J\x1b[0m" in shown
    assert "\x1b[2J" not in shown and "\u202e" not in shown and "\x9b" not in shown and "\x1b]" not in shown


@pytest.mark.parametrize("before", range(40, 120))
def test_a_line_that_is_broken_loses_nothing_of_what_is_written_out(
    before: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{'t' * before}/no{HOSTILE}.png: no such image file. Give the path"
    terminal().print(Text(words, "red"))
    terminal().print(words)
    shown = re.sub(r"\s", "", capsys.readouterr().out)
    assert shown.count(printable(words.replace("\x07", "")).replace(" ", "")) == 2, "rich drops the bell"


def test_plain_lines_json_and_errors_are_shown_alike(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise UserError(HOSTILE)

    echo(HOSTILE)
    echo_json({"é": HOSTILE})
    assert guarded(fails) == 2
    out, err = capsys.readouterr()
    assert obeyed(out) == obeyed(err) == []
    assert json.loads(out.partition("\n")[2]) == {"é": HOSTILE} and "é" in out


@pytest.mark.parametrize("words", [["data", "check"], ["data", "check", "--json"], ["data", "show"], ["plan"]])
def test_commands_obey_nothing_that_a_record_says(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    project = tiny_project(tmp_path)
    images = tmp_path / "data/images"
    Image.new("RGB", (8, 8)).save(images / f"{HOSTILE}.png")
    turns = [{"from": "human", "value": f"<image>{HOSTILE}"}, {"from": "gpt", "value": HOSTILE}]
    good = {"id": HOSTILE, "image": f"{HOSTILE}.png", "conversations": turns}
    bad = {"id": HOSTILE, "image": f"../{HOSTILE}.png", HOSTILE: 1, "conversations": turns}
    (tmp_path / "data/hostile.json").write_text(json.dumps([good, good, bad]))
    choice = [f"data.sources.{name}.annotations=hostile.json" for name in ("pretrain", "finetune")]
    command = [*words, *project.words, *choice, f"store={tmp_path / 'store'}"]
    monkeypatch.setattr("sys.argv", ["tinylmm", *command])
    with pytest.raises(SystemExit):
        main.main()
    out, err = capfd.readouterr()
    assert obeyed(out) == obeyed(err) == []
    assert "title" in out + err


def test_a_traceback_obeys_nothing_either() -> None:
    code = f"from tinylmm.cli.errors import guarded\ndef fails():\n    raise ValueError({HOSTILE!r})\nguarded(fails)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "ValueError: \\x1b[2J" in done.stderr and obeyed(done.stderr) == []


def test_words_of_rich_markup_in_names_are_names(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(title="[/red] in [b]", min_width=40)
    table.add_row("[/x]")
    terminal().print("[/y] and [link=http://a]b", table)
    out = capsys.readouterr().out
    assert all(word in out for word in ("[/red] in [b]", "[/x]", "[/y] and [link=http://a]b"))
    with pytest.raises(MarkupError):  # what is avoided
        Console().print("[/y]")


def test_only_the_terminal_module_makes_consoles() -> None:
    package = Path(tinylmm.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    assert [name for name, text in sources.items() if re.search(r"\b_?Console\(", text)] == ["cli/terminal.py"]
    assert [name for name, text in sources.items() if "rich.markup" in text] == []
