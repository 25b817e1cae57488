"""Whether 64 clients at once for a minute get every answer of `tinylmm serve`, and the right one; how many, and how soon.

    python -m benchmarks.load                             # two minutes: expected answers first, then the load
    python -m benchmarks.load --clients 8 --seconds 5     # a look

What each question is answered alone is computed first, by the engine with one question in its batch. Then every client asks a
question of chance, with one to --new-tokens new tokens, as soon as its last one is answered; one that is told to come again
(the queue is full) does. An answer is wrong if it is not the one it has alone, mixed up if it is what another question has,
and a request is lost if nothing comes, or an error. The model is random and small (`benchmarks.middle`), so that there are many
requests to mix up; server and clients share the machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

import tinylmm
from benchmarks.arguments import whole
from benchmarks.middle import circumstances, options_of, saved_model
from benchmarks.serving import counts, requests, serving

Ending = Literal["right", "wrong", "mixed", "refused", "lost"]
PATIENCE_S = 120
"""A request that is not answered for so long is lost."""


@dataclass(frozen=True)
class Outcome:
    """Of one request: when it was over, in seconds from the load's beginning, and how long it took."""

    ending: Ending
    at: float
    took: float


def main(words: Sequence[str] | None = None) -> int:
    """Make model and questions, put the load on, write the result."""
    own = {"clients": (whole(1), 64, None), "seconds": (whole(1), 60, "of the load")}
    sizes = {"images": 12, "questions": 5, "new_tokens": 16, "width": 128, "layers": 2, "size": 56}
    options = options_of(__doc__, words, "load.json", own, **sizes)
    with tempfile.TemporaryDirectory() as folder:
        model = saved_model(Path(folder) / "small", options)
        asked = [json.loads(body) for body in requests(options)]
        for number, body in enumerate(asked):
            body["max_tokens"] = 1 + number % options.new_tokens
        expected = _alone(model, asked)
        with serving(model) as address:
            outcomes = _load(address, asked, expected, options)
            told = counts(address)
    record = _record(options, outcomes, expected, told)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _draw(outcomes, record, options.out.with_suffix(".png"))
    sys.stdout.write(
        f"{record['requests']} requests of {options.clients} clients in {options.seconds} s: {record['answers_per_s']:.1f} "
        f"answers/s, half of them within {record['latency_s']['p50']:.2f} s, 99 % within {record['latency_s']['p99']:.2f} s; "
        f"wrong {record['wrong']}, mixed up {record['mixed']}, lost {record['lost']}\n"
    )
    return 0 if not record["wrong"] + record["mixed"] + record["lost"] else 1


def _alone(folder: Path, asked: Sequence[dict[str, Any]]) -> list[str]:
    """What each question is answered by the engine with nothing else in its batch."""
    model = tinylmm.load(folder, device="cpu")
    found = []
    for body in asked:
        image, text = body["messages"][0]["content"]
        options = {"max_new_tokens": body["max_tokens"]}
        # as the server sends it, with white space around it
        found.append("".join(model.stream(text["text"], image["image_url"]["url"], **options)))
    return found


def _load(
    address: tuple[str, int], asked: Sequence[dict[str, Any]], expected: Sequence[str], options: argparse.Namespace
) -> list[Outcome]:
    """Have all clients ask until the time is over and their last request is answered."""
    bodies, began = [json.dumps(body).encode() for body in asked], time.monotonic()
    outcomes: list[list[Outcome]] = [[] for _ in range(options.clients)]

    def client(number: int) -> None:
        own = random.Random(number)
        while time.monotonic() - began < options.seconds:
            question, asked_at = own.randrange(len(bodies)), time.monotonic()
            ending = _ending(_reply(address, bodies[question]), question, expected)
            over = time.monotonic()
            outcomes[number].append(Outcome(ending, over - began, over - asked_at))
            if ending == "refused":
                time.sleep(own.random() * 0.2)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [one for some in outcomes for one in some]


def _reply(address: tuple[str, int], body: bytes) -> tuple[int, str] | None:
    """Status and text of an answer; None where none came."""
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        found = json.loads(reply.read())
        return reply.status, found["choices"][0]["message"]["content"] if reply.status == 200 else ""
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _ending(reply: tuple[int, str] | None, question: int, expected: Sequence[str]) -> Ending:
    if reply is None:
        return "lost"
    status, text = reply
    if status != 200:
        return "refused" if status == 429 else "lost"
    if text == expected[question]:
        return "right"
    return "mixed" if text in expected else "wrong"


def _record(
    options: argparse.Namespace, outcomes: Sequence[Outcome], expected: Sequence[str], told: dict[str, float]
) -> dict[str, Any]:
    of = {
        name: [one for one in outcomes if one.ending == name] for name in ("right", "wrong", "mixed", "refused", "lost")
    }
    took = np.array([one.took for one in of["right"]] or [float("nan")])
    last = max(one.at for one in outcomes)
    return {
        **circumstances(options),
        "clients": options.clients,
        "seconds": options.seconds,
        "questions": len(expected),
        "distinct_answers": len(set(expected)),
        "new_tokens": options.new_tokens,
        "requests": len(outcomes),
        "right": len(of["right"]),
        "wrong": len(of["wrong"]),
        "mixed": len(of["mixed"]),
        "lost": len(of["lost"]),
        "told_to_come_again": len(of["refused"]),
        "answers_per_s": round(len(of["right"]) / last, 2),
        "latency_s": {f"p{part}": round(float(np.percentile(took, part)), 3) for part in (50, 90, 99, 100)},
        "rows_a_step": round(told["step_rows"] / told["steps"], 2),
        "prompt_tokens": int(told["prompt_tokens"]),
        "prompt_tokens_reused": int(told["prompt_tokens_reused"]),
        "near_ties": int(told["near_ties"]),
    }


def _draw(outcomes: Sequence[Outcome], record: dict[str, Any], path: Path) -> None:
    """Answers in each second of the load, and how long they took."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    right = [one for one in outcomes if one.ending == "right"]
    figure, (over_time, latencies) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
    over_time.hist([one.at for one in right], bins=np.arange(0, record["seconds"] + 2), color="#2f6fbb")
    over_time.set(xlabel="seconds from the beginning", ylabel="answers in this second")
    took = np.sort([one.took for one in right])
    latencies.plot(took, np.arange(1, len(took) + 1) / len(took) * 100, color="#2f6fbb")
    latencies.set(xlabel="seconds to the whole answer", ylabel="% of answers", xlim=(0, None), ylim=(0, 101))
    for part, name in ((50, "half"), (99, "99 %")):
        at = record["latency_s"][f"p{part}"]
        latencies.axvline(at, color="#9aa5b1", linewidth=1)
        latencies.annotate(f"{name}: {at:.2f} s", (at, 6), xytext=(4, 0), textcoords="offset points", fontsize=8)
    for axes in (over_time, latencies):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{record['clients']} clients at once: {record['requests']:,} requests, wrong {record['wrong']}, "
        f"mixed up {record['mixed']}, lost {record['lost']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
