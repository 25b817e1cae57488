"""How much faster many clients of `tinylmm serve` are answered than one request at a time, in one run.

    python -m benchmarks.serving                                     # 32 clients, 40 images, 20 yes-or-no questions each
    python -m benchmarks.serving --images 4 --baseline 8             # two minutes

Real server processes answer over HTTP, images come as data URIs with every question. Three are measured: `plain` answers one
request at a time and keeps nothing (`--rows 1 --kept-tokens 0 --kept-images 0`), half of it before and half after the others,
as other work on the machine may change; `one client` asks one question after the other of a server with its defaults;
`clients` is what it is about: as many clients, each with its next question as soon as its last is answered, the same server
options. All must say the same. The model is that of `benchmarks.middle`, random and of middle size. Clients and server share
the machine.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import io
import json
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

from benchmarks.arguments import whole
from benchmarks.middle import circumstances, options_of, picture, saved_model, yes_or_no

PLAIN = ("--rows", "1", "--kept-tokens", "0", "--kept-images", "0")


def main(words: Sequence[str] | None = None) -> int:
    """Make model and questions, measure, write the result."""
    options = _options(words)
    with tempfile.TemporaryDirectory() as folder:
        record = _measure(options, saved_model(Path(folder) / "middle", options), requests(options))
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _draw(record, options.out.with_suffix(".png"))
    sys.stdout.write(
        f"plain {record['plain_per_s']:.2f} questions/s, one client {record['one_client_per_s']:.2f}, {options.clients} "
        f"clients {record['clients_per_s']:.2f}: {record['ratio']:.1f} times plain, "
        f"{record['ratio_to_one_client']:.1f} times one client; answers "
        f"{'equal' if record['answers_equal'] else 'DIFFERENT'}\n"
    )
    return 0 if record["answers_equal"] else 1


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    own = {"clients": (whole(1), 32, None), "baseline": (whole(2), 80, "questions asked one at a time")}
    return options_of(__doc__, words, "serving.json", own)


def requests(options: argparse.Namespace) -> list[bytes]:
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
    with serving(folder, *PLAIN) as address:
        plain_s = _ask(address, bodies, chosen[:half], 1, said)
    few: dict[int, str] = {}
    with serving(folder) as address:
        one_s = _ask(address, bodies, list(range(min(len(bodies), 2 * options.baseline))), 1, few)
    found: dict[int, str] = {}
    with serving(folder) as address:
        clients_s = _ask(address, bodies, list(range(len(bodies))), options.clients, found)
        told = counts(address)
    with serving(folder, *PLAIN) as address:
        plain_s += _ask(address, bodies, chosen[half:], 1, said)
    speeds = {
        "plain_per_s": len(said) / plain_s,
        "one_client_per_s": len(few) / one_s,
        "clients_per_s": len(found) / clients_s,
    }
    return {
        **circumstances(options),
        "clients": options.clients,
        "images": options.images,
        "questions": len(bodies),
        "baseline_questions": len(said),
        "new_tokens": options.new_tokens,
        **{name: round(value, 3) for name, value in speeds.items()},
        "ratio": round(speeds["clients_per_s"] / speeds["plain_per_s"], 2),
        "ratio_to_one_client": round(speeds["clients_per_s"] / speeds["one_client_per_s"], 2),
        "answers_equal": all(found[number] == text for known in (said, few) for number, text in known.items()),
        "rows_a_step": round(told["step_rows"] / told["steps"], 2),
        "prompt_tokens": int(told["prompt_tokens"]),
        "prompt_tokens_reused": int(told["prompt_tokens_reused"]),
        "near_ties": int(told["near_ties"]),
        "images_encoded": int(told["images_encoded"]),
    }


@contextmanager
def serving(folder: Path, *more: str) -> Iterator[tuple[str, int]]:
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


def counts(address: tuple[str, int]) -> dict[str, float]:
    connection = http.client.HTTPConnection(*address)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    found = re.findall(r"^tinylmm_(\w+)_total (\S+)$", "\n".join(lines), re.M)
    return {name: float(value) for name, value in found}


def _draw(record: dict[str, Any], path: Path) -> None:
    """A bar for each way of asking."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    named = {
        "one request at a time,\nnothing kept": record["plain_per_s"],
        "one client": record["one_client_per_s"],
        f"{record['clients']} clients": record["clients_per_s"],
    }
    figure, axes = plt.subplots(figsize=(6, 2.6), layout="constrained")
    bars = axes.barh(list(named), list(named.values()), color=["#9aa5b1", "#7aa2d6", "#2f6fbb"])
    axes.bar_label(bars, [f"{value:.2f}" for value in named.values()], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("answers a second")
    asked = f"{record['questions']} questions about {record['images']} images, {record['new_tokens']} new tokens"
    figure.suptitle(f"{record['ratio']:.1f} times one request at a time\n{asked}", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
