"""A real server process with a tiny model, and the requests that tests send it."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from openai import OpenAI
from PIL import Image
from torch import nn

from tests.builders import tiny_loaded
from tinylmm.models.checkpoint import load_model, save_model

N = 24
RED, BLUE = Image.new("RGB", (20, 30), (255, 0, 0)), Image.new("RGB", (16, 16), (0, 0, 255))


def wide_model(folder: Path) -> Path:
    """Random weights, wide enough apart that every token of the context matters to the answer."""
    loaded = tiny_loaded()
    for module in (loaded.model.llm, loaded.model.connector, loaded.model.vision_tower):
        for parameter in module.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.3)
    save_model(loaded, folder, None, {})
    return folder


def roomy_model(folder: Path, endless: bool = False) -> Path:
    """A wide model with a context that no test fills.

    Args:
        endless: its answers end at their limit alone, which may be far.
    """
    wide_model(folder)
    loaded = load_model(folder, [])
    if endless:
        loaded.model.llm.get_output_embeddings().weight.data[loaded.tokenizer.eos_token_id] = 0  # type: ignore[operator]
    loaded.model.llm.config.max_position_embeddings = 1 << 16
    shutil.rmtree(folder)
    save_model(loaded, folder, None, {})
    return folder


def endless_model(folder: Path) -> Path:
    """A model whose answers end at their limit alone, which may be far."""
    return roomy_model(folder, endless=True)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def uri(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def picture(image: Image.Image, as_text: bool = False) -> dict[str, Any]:
    """The part of a message that holds an image."""
    return {"type": "image_url", "image_url": uri(image) if as_text else {"url": uri(image)}}


def words(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


class Server:
    """A running server.

    Attributes:
        url: where it listens, without `/v1`.
    """

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process, self.url = process, url

    def client(self, **options: Any) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, "timeout": 300} | options)

    @cached_property
    def openai(self) -> OpenAI:
        return self.client()

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def metrics(self) -> dict[str, float]:
        """Value by name and labels."""
        with urllib.request.urlopen(f"{self.url}/metrics") as reply:
            lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def wait_for(self, name: str, value: float) -> None:
        """Wait until a metric has a value."""
        until = time.monotonic() + 120
        while self.metrics()[name] != value:
            assert time.monotonic() < until, (name, self.metrics()[name])
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, and return exit code and what it said on stderr."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=180)
        return self.process.returncode, errors


@contextmanager
def serving(folder: Path, *options: str, **environment: str) -> Iterator[Server]:
    """Start `tinylmm serve`, wait until it listens, and kill it in the end if it is still there."""
    command = [sys.executable, "-m", "tinylmm.cli.main", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    try:
        line = process.stdout.readline() if process.stdout else ""
        found = re.search(r"at (http://\S+)/v1", line)
        assert found, (line, process.communicate(timeout=180))
        yield Server(process, found[1])
    finally:
        process.kill()
        process.communicate()
