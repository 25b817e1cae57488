"""`tinylmm import`, `export` and `chat` in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from tests.builders import tiny_loaded
from tests.foreign import foreign, write_factory_folders
from tinylmm.cli.convert import FORMATS, LAYOUTS
from tinylmm.cli.main import app, main, refuse_empty
from tinylmm.convert.format import all_formats
from tinylmm.errors import UserError, printable
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--image", "missing.png"], r"^missing\.png: no such image file"),
        (["--video", "missing.mp4"], r"^missing\.mp4: no such video file"),
        (["--temperature", "-1"], r"^temperature is -1.0; it must be 0"),
        (["--max-new-tokens", "0"], r"^max_new_tokens is 0; it must be at least 1"),
    ],
)
def test_what_is_wrong_with_the_words_is_told_before_a_model_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    def loaded(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded in vain")

    monkeypatch.setattr("tinylmm.generation.session.load", loaded)
    with pytest.raises(UserError, match=said):
        run("chat", folder / "model", *words, text="Hi\n")


@pytest.mark.parametrize("licence", ["", "Apache 2.0", "MIT", "mit\n", "-"])
def test_a_licence_that_is_no_word_of_the_hubs_is_refused_and_nothing_written(
    folder: Path, tmp_path: Path, licence: str
) -> None:
    with pytest.raises(UserError, match=r"--license is '.*'; it must be one of the hub's words"):
        run("export", folder / "model", tmp_path / "hf", "--license", licence)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "model", "hf", "--license", ""], "--license is followed by an empty word: give a value"),
        (["serve", "model", "--name="], "--name is followed by an empty word"),
        (["runs", "--store", ""], "--store is followed by an empty word"),
        (["chat", ""], "an argument is an empty word"),
    ],
)
def test_a_variable_that_is_not_set_is_no_value(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["tinylmm", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and capsys.readouterr().err.startswith(said)
    refuse_empty(["chat", "model", "--image", "a=.png", "--prompt", ""])


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
