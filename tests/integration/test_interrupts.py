"""Ctrl-C and SIGTERM within `export --verify`, `demo` and `serve`: nothing half-written is left, the same command works."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integration.project import environment
from tests.unit.serving.process import RED, endless_model, wide_model
from tinylmm.convert.certificate import CERTIFICATE
from tinylmm.errors import EXIT_STOPPED

PATIENCE = 240.0
SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["ctrl-c", "sigterm"]
)


@contextmanager
def command(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A command in a group of its own, as a terminal has it, whose temporary files go into `folder/tmp`."""
    (folder / "tmp").mkdir(exist_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "tinylmm.cli.main", *words],
        cwd=folder,
        env=environment() | {"TMPDIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it never came"
        time.sleep(0.01)


def send(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal as a terminal does (Ctrl-C, to the group) or a scheduler (to the process); return what was said."""
    family = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert not psutil.wait_procs(family, timeout=30)[1], "a helper goes on"
    return str(errors)


def loads_torch(process: subprocess.Popen[str]) -> bool:
    return any("libtorch" in region.path for region in psutil.Process(process.pid).memory_maps())


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in [*folder.iterdir(), *(folder / "tmp").iterdir()] if path.name != "tmp")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {"wide": wide_model(folder / "wide"), "endless": endless_model(folder / "endless")}


@SIGNALS
def test_an_export_that_is_interrupted_while_another_program_is_asked_leaves_nothing(
    models: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    words = ("export", str(models["wide"]), "out", "--verify", "--questions", "2")
    with command(tmp_path, *words) as process:
        wait_until(lambda: bool(psutil.Process(process.pid).children()), process)
        assert any(name.startswith(".out.") for name in left(tmp_path)), "the draft is there by now"
        errors = send(process, number)
        assert process.returncode == EXIT_STOPPED and "Traceback" not in errors, errors
        assert errors.endswith("the same command continues\n")
    assert left(tmp_path) == []
    with command(tmp_path, *words) as process:
        said, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0 and "verified: transformers" in said, errors
    assert left(tmp_path) == ["out"] and (tmp_path / "out" / CERTIFICATE).is_file()


@pytest.mark.parametrize("words", [("serve",), pytest.param(("demo",), marks=pytest.mark.slow)], ids=["serve", "demo"])
def test_who_stops_a_server_while_it_loads_is_told_and_the_same_command_serves(
    models: dict[str, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    words = (*words, str(models["wide"]), "--port", "0")
    with command(tmp_path, *words) as process:
        wait_until(lambda: loads_torch(process), process)
        errors = send(process, signal.SIGINT)
        assert process.returncode == EXIT_STOPPED and "Traceback" not in errors, errors
    assert left(tmp_path) == []
    with command(tmp_path, *words) as process:
        assert process.stdout is not None and "at http://127.0.0.1:" in process.stdout.readline()
        errors = send(process, signal.SIGINT)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    assert left(tmp_path) == []


@SIGNALS
def test_a_demo_that_is_stopped_in_the_middle_of_an_answer_deletes_uploads_and_frees_its_port(
    models: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    from gradio_client import Client, handle_file

    RED.save(tmp_path / "red.png")
    with command(tmp_path, "demo", str(models["endless"]), "--port", "0") as process:
        assert process.stdout is not None
        found = re.search(r"at http://127.0.0.1:(\d+)", process.stdout.readline())
        assert found
        client = Client(f"http://127.0.0.1:{found[1]}", verbose=False, download_files=False)
        asked = {"text": "Who are you?", "files": [handle_file(tmp_path / "red.png")]}
        job = client.submit(asked, 10_000, 0, 1, None, api_name="/ask")
        wait_until(lambda: len(job.outputs()) > 2, process)
        assert any((tmp_path / "tmp").rglob("red.png")), "the upload is there"
        errors = send(process, number)
        assert process.returncode == 0 and "Traceback" not in errors, errors
    assert left(tmp_path) == ["red.png"]
    shutil.rmtree(tmp_path / "tmp")
    with command(tmp_path, "demo", str(models["endless"]), "--port", found[1]) as process:
        assert process.stdout is not None and found[1] in process.stdout.readline()
