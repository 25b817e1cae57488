"""`tinylmm import`, `export` and `chat` in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.builders import tiny_loaded
from tests.foreign import foreign, write_factory_folders
from tinylmm.cli.convert import FORMATS, LAYOUTS
from tinylmm.cli.main import app
from tinylmm.convert.format import all_formats
from tinylmm.errors import DataError, UserError, printable
from tinylmm.generation.session import load
from tinylmm.models.checkpoint import save_model

SHORT = ["--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    save_model(tiny_loaded(), path / "model", None, {})
    Image.new("RGB", (16, 16), (255, 0, 0)).save(path / "red.png")
    return path


def run(*words: str | Path, text: str | None = None) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], input=text, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_prompt_prints_the_answer_and_leaves(folder: Path) -> None:
    expected = load(folder / "model").chat("What is it?", folder / "red.png", max_new_tokens=6)
    assert (
        run("chat", folder / "model", "--image", folder / "red.png", "--prompt", "What is it?", *SHORT)
        == f"{printable(expected)}\n"
    )


def test_a_conversation_goes_on_over_wrong_files_and_ends_with_ctrl_d(folder: Path) -> None:
    text = f"What is it?\n/image nothing.png\n/image {folder / 'red.png'}\n\n/help\nAnd this?\n/new\nHi\n"
    output = run("chat", folder / "model", *SHORT, text=text)  # the input's end is Ctrl-D
    assert output.count("model ") == 3 and "nothing.png: no such image file" in output.replace("\n", "")


def test_a_missing_first_image_ends_the_command_before_anything_is_asked(folder: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.png: no such image file"):
        run("chat", folder / "model", "--image", folder / "missing.png", text="Hi\n")


def test_an_image_takes_the_place_of_one_that_waits_and_is_confirmed(folder: Path) -> None:
    Image.new("RGB", (16, 16), (0, 0, 255)).save(folder / "blue.png")
    expected = load(folder / "model").chat("What is it?", folder / "blue.png", max_new_tokens=6)
    text = f"/image {folder / 'blue.png'}\nWhat is it?\n"
    output = run("chat", folder / "model", "--image", folder / "red.png", *SHORT, text=text)
    assert f"Your next question comes with {folder / 'blue.png'}." in output.replace("\n", "")
    assert f"model {printable(expected)}" in output


def test_ctrl_c_stops_an_answer_first_and_leaves_at_the_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Hi", KeyboardInterrupt()])

    def typed(*_: object) -> str:
        line = next(lines)
        if isinstance(line, KeyboardInterrupt):
            raise line
        return line

    def interrupted(*_: object, **__: object) -> Iterator[str]:
        yield "half"
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "input", typed)
    monkeypatch.setattr("tinylmm.generation.session.Conversation.stream", interrupted)
    assert "half (stopped)" in run("chat", folder / "model")


def test_import_and_export_tell_what_they_did(tmp_path: Path) -> None:
    write_factory_folders(tmp_path / "factory", foreign())
    output = run("import", tmp_path / "factory", tmp_path / "model")
    assert "factory-folders" in output and "note: the chat template is not stored" in output
    output = run("export", tmp_path / "model", tmp_path / "hf", "--dtype", "bf16")
    usual = (tmp_path / "hf/config.json").stat().st_mode
    assert all(path.stat().st_mode == usual for path in (tmp_path / "hf").iterdir()), "whom the umask lets read it, can"
    assert "logits differ from ours by" in output and (tmp_path / "hf/config.json").is_file()
    assert "its --conv_version" in run("export", tmp_path / "model", tmp_path / "back", "--format", "factory")
    with pytest.raises(UserError, match="exists already"):
        run("export", tmp_path / "model", tmp_path / "hf")


def test_the_command_line_names_every_layout_and_format() -> None:
    formats = all_formats()
    assert ("auto", *(name for known in formats for name in known.readers)) == LAYOUTS
    assert tuple(name for known in formats for name in known.writers) == FORMATS
    assert "factory-folders" in LAYOUTS and "hf" in FORMATS
