"""Answering questions, 20 about each image: one at a time, by the engine as a CPU runs it, and by the engine in fixed shapes,
launched kernel by kernel and replayed from recordings; each engine at batch 1 against batch 64."""

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
from tinylmm.generation.cache import cache_kind
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.fixed import FixedDecoder
from tinylmm.generation.fixed_plan import Granules
from tinylmm.generation.fixed_step import fixed_attention
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.models.lmm import LMM
from tinylmm.planning.graph import build_graph
from tinylmm.planning.specs import TrainStage

T = TypeVar("T")
IMAGES, QUESTIONS, NEW_TOKENS, ALONE = 8, 20, 16, 16
"""Images, questions about each, new tokens of each answer (a random model ends none early), questions asked one at a time."""
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
WAYS = (
    ("bf16", "one at a time"),
    ("bf16", "recorded"),
    ("fp32", "one at a time"),
    ("fp32", "recorded"),
    ("bf16", "engine"),
    ("fp32", "engine"),
    ("bf16", "launched"),
)
TOKENS = 32768
"""Places for tokens in a batch's cache, as an evaluation has by default."""
SMALL = Granules(groups=4, rows=4, columns=8)
"""Of fixed shapes at tiny size, so that prompts of 50 tokens share a prefix."""
FEW = 4
"""Questions asked at batch 1 where that is slow."""
STEPS = 16
"""Steps that are timed by themselves."""


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

    def decoder(self, record: bool) -> FixedDecoder:
        """Fixed shapes for the model in its present precision."""
        granules = SMALL if self.setting.tiny else None
        return FixedDecoder(self.model.llm, cache_kind(self.model.llm), self.ends, TOKENS, granules, record)

    def replies(
        self, rows: int, prompts: list[Prompt], fixed: FixedDecoder | None = None
    ) -> tuple[dict[str, list[int]], Engine]:
        """Answers of an engine, and the engine."""
        sampling = Sampling(max_new_tokens=self.new_tokens)
        engine = Engine(self.model, self.load, self.ends, sampling, rows=rows, tokens=TOKENS, fixed=fixed)
        found = {reply.item_id: reply.ids for batch in engine.replies(prompts) for reply in batch}
        self.setting.sync()
        return found, engine


def answer(setting: Setting) -> None:
    """Emit a row for each precision and way; what matters most comes first, as the section may be ended at its limit."""
    exam = _exam(setting)
    chosen = random.Random(1).sample(exam.prompts, 3 if setting.tiny else ALONE)
    said: dict[str, tuple[dict[str, list[int]], float]] = {}
    for name, way in WAYS:
        exam.model.to(TYPES[name])
        same = {"section": "generation", "llm": setting.llms[0], "precision": name, "way": way}
        if way == "one at a time":
            exam.alone(exam.prompts[:1])  # the first call of anything is slow
            answers, seconds = timed(setting, lambda: exam.alone(chosen))
            said[name] = answers, len(chosen) / seconds
            longest = max(len(prompt.ids) for prompt in exam.prompts)
            setting.say(**same, answers_per_s=said[name][1], prompt_tokens=longest)
            continue
        fixed = None if way == "engine" else exam.decoder(way == "recorded")
        setting.say(**same, **_row(exam, fixed, chosen, *said[name]))


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


def _row(
    exam: Exam, fixed: FixedDecoder | None, chosen: list[Prompt], said: dict[str, list[int]], alone: float
) -> dict[str, Any]:
    """What was measured of an engine.

    Args:
        chosen: questions that are asked at batch 1 too.
        said: what was said to them one at a time, and
        alone: how many a second.
    """
    setting, prompts = exam.setting, exam.prompts
    exam.replies(64, prompts[: exam.asked], fixed)  # the first call of anything is slow
    quick = setting.tiny or (fixed is not None and fixed.unrecorded is None)
    setting.forget_peak()
    (together, engine), fast = timed(setting, lambda: exam.replies(64, prompts, fixed))
    row: dict[str, Any] = {
        "answers_per_s": len(prompts) / fast,
        "ratio": len(prompts) / fast / alone,
        "questions": len(prompts),
        "new_tokens": exam.new_tokens,
        "peak_gib": setting.peak_gib(),
        "promised": engine.exact,
        "near_ties": engine.near_ties,
        "equal_to_one_at_a_time": share(said, together),
        "equal_at_batch_1_and_64": share(exam.replies(1, chosen if quick else chosen[:FEW], fixed)[0], together),
    }
    if fixed is not None:
        row |= _of_steps(exam, fixed)
    trace = Trace(setting.device)
    trace.begin()
    exam.replies(64, prompts[: (3 if quick else 1) * exam.asked], fixed)
    trace.end()
    return row | {key: trace.found[key] for key in ("wall_ms", "kernels", "idle_share", "shares", "top")}


def _of_steps(exam: Exam, fixed: FixedDecoder) -> dict[str, Any]:
    """What fixed shapes cost and are: seconds of examining and recording, and milliseconds of each step."""
    found: dict[str, Any] = {
        "refused": fixed.refused,
        "rows_alike": fixed.alike,
        "unrecorded": fixed.unrecorded,
        "prepared_s": fixed.seconds,
    }
    for shape, steps in fixed.steps().items():
        for name, step in steps.items():
            with fixed_attention(exam.model.llm):
                _, seconds = timed(exam.setting, lambda step=step: [step() for _ in range(STEPS)])  # type: ignore[misc]
            found[f"{name}_ms"] = 1000 * seconds / STEPS
        found["shape"] = repr(shape)
    return found


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
