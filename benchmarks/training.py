"""What packing, cached tower features and supervised-only logits are worth, each on against off in one run on this machine.

    make bench

Times optimiser steps of the embedded finetuning stage's shapes (random weights: speed does not depend on their values) and
writes ratios to benchmarks/results/training.json. Pairs are interleaved, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.data.collate import Collator
from tinylmm.models.build import PartSource, build_lmm
from tinylmm.models.lmm import LMM
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import TrainStage

RESULT = Path(__file__).parent / "results" / "training.json"
WORDS = [
    "llm.init=random",
    "vision_tower.init=random",
    "llm.tokenizer.pretrained=none",
    "llm.tokenizer.vocab_size=null",
]
BATCH, ROUNDS = 32, 15


def main() -> int:
    """Measure each pair and write the results."""
    run = compose_run([*WORDS, "data=digits", "eval=none"])
    spec = next(TrainStage.model_validate(s.spec) for s in build_graph(run, NoFiles()) if s.kind == "train")
    assert spec.llm and spec.vision_tower and spec.connector and spec.tower_output  # the first stage starts from parts
    parts = (PartSource(spec.llm), PartSource(spec.vision_tower), spec.connector, spec.tower_output)
    model = build_lmm(*parts, template="llama", seed=0, trust=[]).train()
    draw = random.Random(0)
    samples = [_sample(draw, number) for number in range(BATCH)]
    size = model.vision_tower.image_size
    pixels = {f"{n}": torch.randn(3, size, size) for n in range(BATCH)}
    packed = _batch(model, samples, pixels, packing=True)
    padded = _batch(model, samples, pixels, packing=False)
    with torch.no_grad():
        features = model.vision_tower(packed["pixel_values"])
    cached = {key: value for key, value in packed.items() if key != "pixel_values"} | {"image_features": features}
    for parameter in model.vision_tower.parameters():
        parameter.requires_grad = False

    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "packing": (lambda: _loss(model, padded), lambda: _loss(model, packed)),
        "cached tower features": (lambda: _loss(model, packed), lambda: _loss(model, cached)),
        "logits at supervised positions only": (lambda: _full_logits(model, cached), lambda: _loss(model, cached)),
        "all three": (lambda: _full_logits(model, padded), lambda: _loss(model, cached)),
    }
    rows = {name: _compare(model, before, after) for name, (before, after) in pairs.items()}
    record = {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "pairs": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, row in rows.items():
        sys.stdout.write(f"{name:38} {row['before_ms']:7.1f} ms -> {row['after_ms']:7.1f} ms  {row['ratio']:.2f}x\n")
    return 0


def _sample(draw: random.Random, number: int) -> dict[str, Any]:
    """A sample as the digits data has them: one image, one to six short turns."""
    turns = draw.randint(1, 6)
    ids = [-200, *(draw.randrange(5, 300) for _ in range(40 + 14 * turns))]
    labels = [i if position % 14 in (0, 1) else -100 for position, i in enumerate(ids)]
    labels[0] = -100
    return {"sample_id": str(number), "input_ids": ids, "labels": labels, "images": [str(number)]}


def _batch(model: LMM, samples: list[dict[str, Any]], pixels: dict[str, Tensor], packing: bool) -> dict[str, Any]:
    made = Collator(model.image_tokens, 3, 320, packing, pixels.__getitem__, 320)(samples)
    return {key: made[key] for key in ("input_ids", "position_ids", "targets", "pixel_values")}


def _loss(model: LMM, batch: dict[str, Any]) -> Tensor:
    return model(**batch).loss_sum


def _full_logits(model: LMM, batch: dict[str, Any]) -> Tensor:
    """The plain way: logits at every position, then cross-entropy that ignores most of them."""
    embeddings, _ = model.embed(batch["input_ids"], batch.get("pixel_values"), batch.get("image_features"))
    logits = model.llm(inputs_embeds=embeddings, position_ids=batch["position_ids"], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")


def _compare(model: LMM, before: Callable[[], Tensor], after: Callable[[], Tensor]) -> dict[str, float]:
    times: tuple[list[float], list[float]] = ([], [])
    torch.testing.assert_close(before(), after(), rtol=1e-4, atol=1e-3)
    for _ in range(ROUNDS):
        for function, seconds in zip((before, after), times, strict=True):
            begin = time.perf_counter()
            function().backward()
            seconds.append(time.perf_counter() - begin)
            model.zero_grad()
    slow, fast = (statistics.median(t) * 1000 for t in times)
    return {"before_ms": slow, "after_ms": fast, "ratio": slow / fast}


if __name__ == "__main__":
    sys.exit(main())
