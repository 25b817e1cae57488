"""Answering questions, 20 about each image: one at a time against the engine, and the engine at batch 1 against batch 64."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.eval import ask_alone
from benchmarks.gpu_sections.kernels import Trace
from benchmarks.gpu_sections.ours import random_model
from benchmarks.gpu_sections.setting import Setting
from benchmarks.middle import middle_tokenizer, yes_or_no
from tests.builders import NoFiles
from tinylmm.data.chat import get_template
from tinylmm.data.slots import question
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.lmm import LMM
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import TrainStage

T = TypeVar("T")
IMAGES, QUESTIONS, NEW_TOKENS, ALONE = 8, 20, 16, 16
"""Images, questions about each, new tokens of each answer (a random model ends none early), questions asked one at a time."""
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Exam:
    """A model and what it is asked."""

    setting: Setting
    model: LMM
    tokenizer: PreTrainedTokenizerFast
    ends: frozenset[int]
    pixels: Tensor
    prompts: list[Prompt]
    asked: int
    new_tokens: int

    def load(self, key: str) -> Tensor:
        """Pixels of an image."""
        return self.pixels[int(key)]

    def alone(self, prompts: list[Prompt]) -> dict[str, list[int]]:
        """Answers to prompts, asked one at a time."""
        return {p.item_id: ask_alone(self.model, self.load, p, self.tokenizer, self.new_tokens) for p in prompts}

    def replies(self, rows: int, prompts: list[Prompt], invariant: bool = False) -> tuple[dict[str, list[int]], Engine]:
        """Answers of an engine, and the engine."""
        sampling = Sampling(max_new_tokens=self.new_tokens)
        engine = Engine(self.model, self.load, self.ends, sampling, rows=rows, invariant=invariant)
        found = {reply.item_id: reply.ids for batch in engine.replies(prompts) for reply in batch}
        self.setting.sync()
        return found, engine


def answer(setting: Setting) -> None:
    """Emit a row for each precision."""
    exam = _exam(setting)
    for name, dtype in TYPES.items():
        exam.model.to(dtype)
        setting.say(section="generation", llm=setting.llms[0], precision=name, **_row(exam, apart=name == "bf16"))


def _exam(setting: Setting) -> Exam:
    run = setting.compose(setting.llms[0])
    first = next(TrainStage.model_validate(s.spec) for s in build_graph(run, NoFiles()) if s.kind == "train")
    model = random_model(setting, run, first).model.eval().requires_grad_(False)
    tokenizer = middle_tokenizer()
    maker = PromptMaker(get_template("llama"), tokenizer)
    images, asked = (2, 3) if setting.tiny else (IMAGES, QUESTIONS)
    size = run.vision_tower.image.size
    pixels = torch.randn(images, 3, size, size, generator=torch.Generator().manual_seed(0))
    draw = random.Random(0)
    prompts = [
        maker.prompt(f"{n}-{turn}", [question(yes_or_no(draw), 1)], [str(n)], [model.image_tokens])
        for n in range(images)
        for turn in range(asked)
    ]
    return Exam(setting, model, tokenizer, maker.ends, pixels, prompts, asked, 3 if setting.tiny else NEW_TOKENS)


def _row(exam: Exam, apart: bool) -> dict[str, Any]:
    """What was measured in the precision at hand; `apart` measures the engine with rows computed apart too."""
    setting, prompts = exam.setting, exam.prompts
    chosen = random.Random(1).sample(prompts, 3 if setting.tiny else ALONE)
    exam.alone(prompts[:1])  # the first call of anything is slow
    said, slow = timed(setting, lambda: exam.alone(chosen))
    exam.replies(64, prompts[: exam.asked])  # as above
    setting.forget_peak()
    (together, engine), fast = timed(setting, lambda: exam.replies(64, prompts))
    row: dict[str, Any] = {
        "questions": len(prompts),
        "prompt_tokens": max(len(prompt.ids) for prompt in prompts),
        "new_tokens": exam.new_tokens,
        "one_at_a_time_per_s": len(chosen) / slow,
        "engine_per_s": len(prompts) / fast,
        "ratio": slow / len(chosen) * len(prompts) / fast,
        "peak_gib": setting.peak_gib(),
        "promised": engine.exact,
        "near_ties": engine.near_ties,
        "equal_to_one_at_a_time": share(said, together),
        "equal_at_batch_1_and_64": share(exam.replies(1, chosen)[0], together),
    }
    if apart:  # slower, and equal by construction
        some = prompts[: 2 * exam.asked]
        (found, _), seconds = timed(setting, lambda: exam.replies(64, some, invariant=True))
        few = exam.replies(1, some[:: max(1, exam.asked // 4)], invariant=True)[0]
        row |= {"invariant_per_s": len(some) / seconds, "invariant_equal_at_batch_1_and_64": share(few, found)}
    trace = Trace(setting.device)
    trace.begin()
    exam.replies(64, prompts[: 3 * exam.asked])
    trace.end()
    return row | {"idle_share": trace.found["idle_share"], "shares": trace.found["shares"]}


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
