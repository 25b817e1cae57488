"""How much faster many clients of `tinylmm serve` are answered than one request at a time, in one run.

    python -m benchmarks.serving                                     # 32 clients, 40 images, 20 yes-or-no questions each
    python -m benchmarks.serving --images 4 --baseline 8             # two minutes

Real server processes answer over HTTP, images come as data URIs with every question. Three are measured: `plain` answers one
request at a time and keeps nothing (`--rows 1 --kept-tokens 0 --kept-images 0`), half of it before and half after the others,
as other work on the machine may change; `one client` asks one question after the other of a server with its defaults;
`clients` is what it is about: as many clients, each with its next question as soon as its last is answered, the same server
options. All must say the same. The model is that of `benchmarks.eval`, random and of middle size. Clients and server share the
machine.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
import os
import platform
import queue
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import file_to_write, whole
from benchmarks.eval import middle_model, middle_tokenizer, picture, yes_or_no
from tinylmm.config.description import ModelDescription
from tinylmm.config.identities import ConnectorIdentity, TowerOutput
from tinylmm.config.spec import ImageSpec
from tinylmm.models.checkpoint import LoadedModel, save_model

RESULT = Path(__file__).parent / "results" / "serving.json"
PLAIN = ("--rows", "1", "--kept-tokens", "0", "--kept-images", "0")


def main(words: Sequence[str] | None = None) -> int:
    """Make model and questions, measure, write the result."""
    options = _options(words)
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder) / "middle", options)
        record = _measure(options, Path(folder) / "middle", _questions(options))
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"plain {record['plain_per_s']:.2f} questions/s, one client {record['one_client_per_s']:.2f}, {options.clients} "
        f"clients {record['clients_per_s']:.2f}: {record['ratio']:.1f} times plain, "
        f"{record['ratio_to_one_client']:.1f} times one client; answers "
        f"{'equal' if record['answers_equal'] else 'DIFFERENT'}\n"
    )
    return 0 if record["answers_equal"] else 1


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=whole(1), default=32)
    parser.add_argument("--images", type=whole(1), default=40)
    parser.add_argument("--questions", type=whole(1), default=20, help="questions an image")
    parser.add_argument("--baseline", type=whole(2), default=80, help="questions asked one at a time")
    parser.add_argument("--new-tokens", type=whole(1), default=3)
    parser.add_argument("--width", type=whole(128, multiple_of=128), default=384, help="of the language model")
    parser.add_argument("--layers", type=whole(1), default=6, help="of the language model")
    parser.add_argument("--size", type=whole(14), default=336, help="of the tower's input, in pixels")
    parser.add_argument("--out", type=file_to_write, default=RESULT)
    parser.add_argument("--note", default="", help="kept with the result, e.g. what else the machine was doing")
    return parser.parse_args(words)


def _save_model(folder: Path, options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    description = ModelDescription.of_targets(
        "transformers.LlamaForCausalLM",
        "tinylmm.models.vision.HFVisionTower",
        "transformers.SiglipVisionModel",
        TowerOutput(select_layer=-2, select="patch", drop_first_token=False),
        ConnectorIdentity(**{"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}}),
        ImageSpec(size=options.size, mean=(0.5,) * 3, std=(0.5,) * 3, mode="squash", resample="bicubic"),
        "llama",
    )
    model = middle_model(options.width, options.layers, options.size)
    save_model(LoadedModel(model, middle_tokenizer(), description, None), folder, None, {})


def _questions(options: argparse.Namespace) -> list[bytes]:
    """Requests, those about one image one after the other."""
    draw = random.Random(0)
    found = []
    for _ in range(options.images):
        buffer = io.BytesIO()
        picture(draw).save(buffer, "JPEG")
        url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        for _ in range(options.questions):
            parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": yes_or_no(draw)}]
            asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": options.new_tokens}
            found.append(json.dumps(asked).encode())
    return found


def _measure(options: argparse.Namespace, folder: Path, bodies: list[bytes]) -> dict[str, Any]:
    chosen = random.Random(1).sample(range(len(bodies)), min(options.baseline, len(bodies)))
    half = len(chosen) // 2
    said: dict[int, str] = {}
    with _serving(folder, *PLAIN) as address:
        plain_s = _ask(address, bodies, chosen[:half], 1, said)
    few: dict[int, str] = {}
    with _serving(folder) as address:
        one_s = _ask(address, bodies, list(range(min(len(bodies), 2 * options.baseline))), 1, few)
    found: dict[int, str] = {}
    with _serving(folder) as address:
        clients_s = _ask(address, bodies, list(range(len(bodies))), options.clients, found)
        counts = _counts(address)
    with _serving(folder, *PLAIN) as address:
        plain_s += _ask(address, bodies, chosen[half:], 1, said)
    speeds = {
        "plain_per_s": len(said) / plain_s,
        "one_client_per_s": len(few) / one_s,
        "clients_per_s": len(found) / clients_s,
    }
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "note": options.note,
        "clients": options.clients,
        "images": options.images,
        "questions": len(bodies),
        "baseline_questions": len(said),
        "new_tokens": options.new_tokens,
        **{name: round(value, 3) for name, value in speeds.items()},
        "ratio": round(speeds["clients_per_s"] / speeds["plain_per_s"], 2),
        "ratio_to_one_client": round(speeds["clients_per_s"] / speeds["one_client_per_s"], 2),
        "answers_equal": all(found[number] == text for known in (said, few) for number, text in known.items()),
        "rows_a_step": round(counts["step_rows"] / counts["steps"], 2),
        "prompt_tokens": int(counts["prompt_tokens"]),
        "prompt_tokens_reused": int(counts["prompt_tokens_reused"]),
        "near_ties": int(counts["near_ties"]),
        "images_encoded": int(counts["images_encoded"]),
    }


@contextmanager
def _serving(folder: Path, *more: str) -> Iterator[tuple[str, int]]:
    """A server process; yields its host and port."""
    command = [sys.executable, "-m", "tinylmm.cli.main", "serve", str(folder), "--port", "0", *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        listens = re.search(r"http://([^:]+):(\d+)/v1", line)
        if listens is None:
            process.kill()
            raise RuntimeError(f"the server did not start: {line}")
        try:
            yield listens[1], int(listens[2])
        finally:
            process.terminate()


def _ask(address: tuple[str, int], bodies: list[bytes], wanted: list[int], clients: int, said: dict[int, str]) -> float:
    """Ask questions, put answers into `said`, and return the seconds from the first question to the last answer."""
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in wanted:
        waiting.put(number)

    def client() -> None:
        connection = http.client.HTTPConnection(*address, timeout=600)
        try:
            while True:
                number = waiting.get_nowait()
                headers = {"Content-Type": "application/json"}
                connection.request("POST", "/v1/chat/completions", bodies[number], headers)
                reply = json.loads(connection.getresponse().read())
                said[number] = reply["choices"][0]["message"]["content"]
        except queue.Empty:
            connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - began
    if missing := [number for number in wanted if number not in said]:
        raise RuntimeError(f"{len(missing)} of {len(wanted)} questions were not answered")
    return seconds


def _counts(address: tuple[str, int]) -> dict[str, float]:
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = re.findall(r"^tinylmm_(\w+)_total (\S+)$", "\n".join(lines), re.M)
    return {name: float(value) for name, value in found}


if __name__ == "__main__":
    sys.exit(main())
