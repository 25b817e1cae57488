"""Gives the commands of docs/serving.md: `python -m tests.serving_page STORE`, on the store of a finished quickstart."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gradio_client import Client, handle_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.M | re.S)
COMMAND = re.compile(r"^\$ (.+)$", re.M)
SCRIPT = re.compile(r"^```python title=(\S+)\n(.*?)^```", re.M | re.S)
ADDRESS = re.compile(r"127\.0\.0\.1:8000")
MODULES = {"tinylmm": "tinylmm.cli.main", "tinylmm-train": "tinylmm.cli.train"}
QUESTION = "How many digits are there?"


def follow(folder: Path, words: Sequence[str] = ()) -> dict[str, str]:
    """Give the page's commands in a folder that holds `store/`; return what each said on stdout.

    Args:
        words: that the store's run was made with.
    """
    said: dict[str, str] = {}
    for _, text in SECTION.findall(PAGE):
        commands = COMMAND.findall(text)
        served = next((command for command in commands if command.startswith("tinylmm serve")), None)
        if served is not None:
            with _running(served, folder) as address:
                said[served] = address
                for command in commands:
                    if command != served:
                        said[command] = _give(ADDRESS.sub(address, command), folder)
                for name, script in SCRIPT.findall(text):
                    (folder / name).write_text(ADDRESS.sub(address, script), encoding="utf-8")
                    said[name] = _give(f"{sys.executable} {name}", folder)
            continue
        for command in commands:
            if command.startswith("tinylmm demo"):
                said[command] = _shown(command, folder)
            else:
                more = f" {shlex.join(words)}" if command.startswith("tinylmm-train") else ""
                said[command] = _give(command + more, folder)
    return said


def _give(command: str, folder: Path) -> str:
    """Give a command, and return what it said."""
    if command.startswith("pip install"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        named = re.findall(r"tinylmm\[(\w+)\]", command)
        assert named and set(named) <= set(extras), command
        return ""
    done = subprocess.run(
        ["bash", "-c", _spelt(command)], cwd=folder, env=_environment(), capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def _spelt(command: str) -> str:
    """A command with our programs as this Python has them."""
    name, _, rest = command.partition(" ")
    return f"exec {shlex.quote(sys.executable)} -m {MODULES[name]} {rest}" if name in MODULES else command


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "TINYLMM_STORE"}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@contextmanager
def _running(command: str, folder: Path) -> Iterator[str]:
    """A command that serves, on a free port: host and port. At the end it is told to stop, and does so well."""
    process = subprocess.Popen(
        ["bash", "-c", _spelt(f"{command} --port 0")],
        cwd=folder,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"at http://([\d.]+:\d+)", line)
        assert found, (line, process.communicate(timeout=300))
        yield found[1]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    finally:
        process.kill()
        process.communicate()


def _shown(command: str, folder: Path) -> str:
    """Ask a question on the demo's page as a program does, and return the line below the last model's answer."""
    with _running(command, folder) as address:
        client = Client(f"http://{address}", verbose=False)
        asked = {"text": QUESTION, "files": [handle_file(folder / "scene.png")]}
        shown = client.predict(asked, 16, 0, 1, None, api_name="/ask")
        *others, notice = shown
        assert not isinstance(notice, str) or not notice, notice  # no text: it is left as it was, which is empty
        return [text for text in others if isinstance(text, str)][-1]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "store").symlink_to(Path(sys.argv[1]).resolve())
        for what, output in follow(Path(made)).items():
            sys.stdout.write(f"$ {what}\n{output}\n")
