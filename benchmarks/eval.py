"""How much faster the generation engine answers a POPE-like set than asking one question at a time, in one run.

    python -m benchmarks.eval                                        # 200 images, 20 yes-or-no questions each
    python -m benchmarks.eval --images 10 --baseline 20              # a minute

The model is random and of middle size (a tower of 576 image tokens, a Llama): speed does not depend on the weights, answers
do, so they are cut after --new-tokens (a "Yes" and its end are two). One at a time means what evaluation scripts usually do:
open the image, run the tower, generate with transformers, for every question anew. As every question
costs it the same, it is timed on --baseline of them, half before and half after the engine, which answers all. Both must say
the same.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from benchmarks.arguments import whole
from benchmarks.middle import circumstances, middle_model, middle_tokenizer, options_of, picture, yes_or_no
from tinylmm.data.chat import get_template
from tinylmm.data.slots import question
from tinylmm.data.transform import ImageTransform
from tinylmm.evaluation.benchmarks.digits import Digits
from tinylmm.evaluation.benchmarks.records import Item
from tinylmm.evaluation.images import open_image_ref
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.lmm import LMM


def main(words: Sequence[str] | None = None) -> int:
    """Make the set and the model, measure, write the result."""
    options = _options(words)
    torch.manual_seed(0)
    model, tokenizer = middle_model(options.width, options.layers, options.size), middle_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        items = _write_set(Path(folder), options)
        record = _measure(options, model, tokenizer, items)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(
        f"one at a time {record['one_at_a_time_per_s']:.2f} questions/s, engine {record['engine_per_s']:.2f}: "
        f"{record['ratio']:.1f} times as fast, answers {'equal' if record['answers_equal'] else 'DIFFERENT'}\n"
    )
    return 0 if record["answers_equal"] else 1


def _options(words: Sequence[str] | None) -> argparse.Namespace:
    own = {"baseline": (whole(1), 120, "questions asked one at a time")}
    return options_of(__doc__, words, "eval.json", own, images=200)


def _write_set(folder: Path, options: argparse.Namespace) -> list[Item]:
    """Write images and a question file, and read them back as a benchmark's items."""
    draw = random.Random(0)
    (folder / "images").mkdir()
    rows = []
    for number in range(options.images):
        picture(draw).save(folder / "images" / f"{number}.jpg")
        for turn in range(options.questions):
            text = yes_or_no(draw)
            row = {"question_id": f"{number}-{turn}", "image": f"{number}.jpg", "text": text}
            rows.append({**row, "category": "adversarial", "answer": draw.choice(["yes", "no"]), "options": 2})
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Digits().load(folder)


def _measure(
    options: argparse.Namespace, model: LMM, tokenizer: PreTrainedTokenizerFast, items: list[Item]
) -> dict[str, Any]:
    maker = PromptMaker(get_template("llama"), tokenizer)
    refs = {item.images[0].key: item.images[0] for item in items}
    transform = ImageTransform(options.size, (0.5,) * 3, (0.5,) * 3, "squash")
    prompts = [
        maker.prompt(item.item_id, [question(item.prompt, 1)], [item.images[0].key], [model.image_tokens])
        for item in items
    ]

    def load(key: str) -> torch.Tensor:
        return transform(open_image_ref(refs[key]))

    def alone(prompt: Prompt) -> list[int]:
        return ask_alone(model, load, prompt, tokenizer, options.new_tokens)

    chosen = random.Random(1).sample(prompts, min(options.baseline, len(prompts)))
    halves = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    alone(prompts[0])  # the first call of anything is slow
    said: dict[str, list[int]] = {}
    slow = _timed(lambda: said.update({prompt.item_id: alone(prompt) for prompt in halves[0]}))
    engine = Engine(model, load, maker.ends, Sampling(max_new_tokens=options.new_tokens))
    found: dict[str, list[int]] = {}
    fast = _timed(lambda: found.update({r.item_id: r.ids for batch in engine.replies(prompts) for r in batch}))
    slow = slow + _timed(lambda: said.update({prompt.item_id: alone(prompt) for prompt in halves[1]}))
    per_s = {"one_at_a_time_per_s": len(chosen) / slow.wall, "engine_per_s": len(prompts) / fast.wall}
    return {
        **circumstances(options),
        "images": options.images,
        "questions": len(prompts),
        "baseline_questions": len(chosen),
        "prompt_tokens": max(len(prompt.ids) for prompt in prompts),
        "image_tokens": model.image_tokens,
        "new_tokens": options.new_tokens,
        "llm_parameters": sum(p.numel() for p in model.llm.parameters()),
        "tower_parameters": sum(p.numel() for p in model.vision_tower.parameters()),
        **{name: round(value, 3) for name, value in per_s.items()},
        "one_at_a_time_s": round(slow.wall, 2),
        "engine_s": round(fast.wall, 2),
        "ratio": round(per_s["engine_per_s"] / per_s["one_at_a_time_per_s"], 2),
        "ratio_of_cpu_time": round(slow.cpu / len(chosen) / (fast.cpu / len(prompts)), 2),
        "answers_equal": all(found[item_id] == ids for item_id, ids in said.items()),
        "near_ties": engine.near_ties,
        "images_encoded": engine.images_encoded,
    }


def ask_alone(
    model: LMM, load: Callable[[str], torch.Tensor], prompt: Prompt, tokenizer: PreTrainedTokenizerFast, new_tokens: int
) -> list[int]:
    """Answer one question as evaluation scripts do: the image through the tower, then transformers' greedy generation."""
    device = next(model.llm.parameters()).device
    with torch.no_grad():
        features = model.tower_features(load(prompt.images[0])[None])
        embeddings, _ = model.embed(torch.tensor([prompt.ids], device=device), None, features)
    end = int(tokenizer.eos_token_id)
    choice: dict[str, Any] = {"do_sample": False, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    new: Any = model.llm.generate(inputs_embeds=embeddings, max_new_tokens=new_tokens, **choice)  # type: ignore[operator]
    ids: list[int] = new[0].tolist()
    return ids[: ids.index(end)] if end in ids else ids


@dataclass(frozen=True)
class Cost:
    """Seconds that passed, and seconds of all cores that this process used: a busy machine stretches the former alone."""

    wall: float
    cpu: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall + other.wall, self.cpu + other.cpu)


def _timed(work: Any) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    sys.exit(main())
