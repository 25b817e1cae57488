"""Answering questions, 20 about each image: one at a time against the engine, and the engine at batch 1 against batch 64."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.eval import ask_alone, middle_tokenizer, yes_or_no
from benchmarks.gpu_sections.kernels import Trace
from benchmarks.gpu_sections.ours import random_model
from benchmarks.gpu_sections.setting import Setting
from tests.builders import NoFiles
from tinylmm.data.chat import get_template
from tinylmm.data.slots import question
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import TrainStage

T = TypeVar("T")
IMAGES, QUESTIONS, NEW_TOKENS, ALONE = 8, 20, 16, 16
"""Images, questions about each, new tokens of each answer (a random model ends none early), questions asked one at a time."""
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def answer(setting: Setting) -> None:
    """Emit a row for each precision."""
    llm = setting.llms[0]
    run = setting.compose(llm)
    first = next(TrainStage.model_validate(s.spec) for s in build_graph(run, NoFiles()) if s.kind == "train")
    model = random_model(setting, run, first).model.eval().requires_grad_(False)
    tokenizer = middle_tokenizer()
    maker = PromptMaker(get_template("llama"), tokenizer)
    images, asked = (2, 3) if setting.tiny else (IMAGES, QUESTIONS)
    new_tokens, alone = (3, 3) if setting.tiny else (NEW_TOKENS, ALONE)
    size = run.vision_tower.image.size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    draw = random.Random(0)
    prompts = [
        maker.prompt(f"{n}-{turn}", [question(yes_or_no(draw), 1)], [str(n)], [model.image_tokens])
        for n in range(images)
        for turn in range(asked)
    ]

    chosen = random.Random(1).sample(prompts, alone)

    def load(key: str) -> Tensor:
        return pixels[int(key)]

    def ask(prompt: Prompt) -> list[int]:
        return ask_alone(model, load, prompt, tokenizer, new_tokens)

    def replies(rows: int, prompts: list[Prompt], invariant: bool = False) -> tuple[dict[str, list[int]], Engine]:
        sampling = Sampling(max_new_tokens=new_tokens)
        engine = Engine(model, load, maker.ends, sampling, rows=rows, invariant=invariant)
        return {reply.item_id: reply.ids for batch in engine.replies(prompts) for reply in batch}, engine

    for name, dtype in TYPES.items():
        model.to(dtype)
        ask(prompts[0])  # the first call of anything is slow
        setting.forget_peak()
        said, slow = timed(setting, lambda: {prompt.item_id: ask(prompt) for prompt in chosen})
        replies(64, prompts[:asked])  # as above
        setting.forget_peak()
        (together, engine), fast = timed(setting, lambda: replies(64, prompts))
        row: dict[str, Any] = {
            "llm": llm,
            "precision": name,
            "questions": len(prompts),
            "prompt_tokens": max(len(prompt.ids) for prompt in prompts),
            "new_tokens": new_tokens,
            "one_at_a_time_per_s": len(chosen) / slow,
            "engine_per_s": len(prompts) / fast,
            "ratio": slow / len(chosen) * len(prompts) / fast,
            "peak_gib": setting.peak_gib(),
            "promised": engine.exact,
            "near_ties": engine.near_ties,
            "equal_to_one_at_a_time": share(said, together),
            "equal_at_batch_1_and_64": share(replies(1, chosen)[0], together),
        }
        if name == "bf16":  # the same with rows computed apart: slower, and equal by construction
            some = prompts[: 2 * asked]
            (apart, _), seconds = timed(setting, lambda: replies(64, some, invariant=True))
            few = replies(1, some[:: max(1, asked // 4)], invariant=True)[0]
            row |= {"invariant_per_s": len(some) / seconds, "invariant_equal_at_batch_1_and_64": share(few, apart)}
        trace = Trace(setting.device)
        trace.begin()
        replies(64, prompts[: 3 * asked])
        setting.sync()
        trace.end()
        setting.say(section="generation", **row, idle_share=trace.found["idle_share"], shares=trace.found["shares"])


def timed(setting: Setting, work: Callable[[], T]) -> tuple[T, float]:
    """What some work returns, and the seconds it takes until the device has done it."""
    setting.sync()
    began = time.perf_counter()
    found = work()
    setting.sync()
    return found, time.perf_counter() - began


def share(some: dict[str, list[int]], others: dict[str, list[int]]) -> float:
    """Share of `some` answers that `others` has alike."""
    return sum(others[key] == ids for key, ids in some.items()) / len(some)
