"""What a score was made by: all that changes it and is no part of the model. No torch.

It stands beside every score (scores.json, results.json, tables), so that figures are compared with their like only.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Item

OWN = "the model's own"


@dataclass(frozen=True)
class Protocol:
    """How a benchmark was asked and scored.

    Attributes:
        benchmark, variant: whose questions, and which of its scoring rules.
        split: where the benchmark has several.
        layout: which files the questions were read from; the prompts of `llava` and `hf` differ.
        options: of the benchmark's class, defaults included.
        limit, seed: how many questions were wanted, and of which draw; None and 0 where all were.
        asked, total: questions that were asked, and that there are.
        questions: digest of what was asked: prompts, right answers, names of images.
        template, max_new_tokens, precision: of asking.
        frames: which frames of videos were shown, in words; None where there were none.
        judge, judge_runs: model that took part in scoring, and how often it judged each answer.
        code: version of the code that asks and scores (`planning/kinds.py`).
        top: best score of one question; 1 unless a judge gives ratings.
        departs: in words, what differs from the protocol that papers report.
        own: which of template and frames were left to the model: it was asked with those that it was trained with.
    """

    benchmark: str
    variant: str
    split: str | None = None
    layout: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    limit: int | None = None
    seed: int = 0
    asked: int | None = None
    total: int | None = None
    questions: str | None = None
    template: str | None = None
    max_new_tokens: int | None = None
    precision: str | None = None
    frames: str | None = None
    judge: str | None = None
    judge_runs: int = 1
    code: int | None = None
    top: float = 1.0
    departs: tuple[str, ...] = ()
    own: tuple[str, ...] = ()

    @property
    def general(self) -> Protocol:
        """The same for models of any template and any frames, where they were left to the model.

        They are then part of what is compared, as its weights are, and no difference in how it was asked.
        """
        return self.without(self.own)

    def without(self, left: Collection[str]) -> Protocol:
        """The same with `the model's own` in place of template or frames."""
        template = OWN if "template" in left else self.template
        if self.frames is None or "frames" not in left:
            return replace(self, template=template)
        baseline, of, _ = self.frames.rpartition(" of ")  # `middle of uniform 8`
        return replace(self, template=template, frames=f"{baseline}{of}{OWN}")

    @property
    def name(self) -> str:
        """Benchmark and variant, as in `gqa-llava`."""
        return f"{self.benchmark}-{self.variant}" if self.variant else self.benchmark

    @property
    def limited(self) -> bool:
        """Whether only some of the questions were asked."""
        return self.asked is not None and self.total is not None and self.asked < self.total

    def as_json(self) -> dict[str, Any]:
        """For scores.json and results.json."""
        fields = {"name": self.name, **asdict(self), "departs": list(self.departs), "limited": self.limited}
        absent = {"frames"} if self.frames is None else set()
        absent |= set() if self.own else {"own"}
        return {key: value for key, value in fields.items() if key not in absent}

    @classmethod
    def of_json(cls, record: Mapping[str, Any] | str | None, benchmark: str) -> Protocol:
        """Read it back; earlier versions wrote its name alone."""
        if not isinstance(record, Mapping):
            return cls(benchmark, str(record or "").removeprefix(f"{benchmark}-").removeprefix(benchmark))
        known = {name: record[name] for name in (one.name for one in fields(cls)) if name in record}
        return cls(**{**known, **{name: tuple(known.get(name, ())) for name in ("departs", "own")}})

    def facts(self) -> list[tuple[str, str]]:
        """What is known of it as names and values, in the order of interest."""
        asked = "" if self.asked is None else f"{self.asked:,}"
        if self.limited:
            asked += f" of {self.total:,} (limit {self.limit}, seed {self.seed})"
        judge = None if self.judge is None else f"{self.judge} × {self.judge_runs}"
        found = {
            "split": self.split,
            "questions": asked,
            "layout": self.layout,
            **{name: json.dumps(value) for name, value in self.options.items()},
            "template": self.template,
            "new tokens": self.max_new_tokens,
            "precision": self.precision,
            "frames": self.frames,
            "judge": judge,
            "code": self.code,
        }
        return [
            ("protocol", self.name),
            *((name, str(value)) for name, value in found.items() if value not in (None, "")),
        ]

    def alike(self, other: Protocol) -> bool:
        """Whether two models' figures may stand in one column: equal, or only as different as the models are."""
        return replace(self, own=()) == replace(other, own=()) or self.general == other.general

    def comparable(self, other: Protocol) -> bool:
        """Whether the two differ in which questions were asked at most: answers to the same ones can be paired."""
        blank: dict[str, Any] = {
            "limit": None,
            "seed": 0,
            "asked": None,
            "total": None,
            "questions": None,
            "departs": (),
        }
        return replace(self, **blank).alike(replace(other, **blank))

    def differences(self, other: Protocol) -> list[str]:
        """In words, every way in which two protocols differ; other questions only where nothing else explains them."""
        one, two = (self.general, other.general) if self.own == other.own else (self, other)
        ours, theirs = dict(one.facts()), dict(two.facts())
        names = dict.fromkeys([*ours, *theirs])
        found = [
            f"{name} {ours.get(name, 'not known')} and {theirs.get(name, 'not known')}"
            for name in names
            if ours.get(name) != theirs.get(name)
        ]
        if not found and self.questions != other.questions:
            return ["other questions"]
        return found


def shared(protocols: Iterable[Protocol]) -> dict[Protocol, Protocol]:
    """Each protocol -> the one that stands for all that are alike, without what differs between their models."""
    groups: list[list[Protocol]] = []
    for protocol in dict.fromkeys(protocols):
        group = next((group for group in groups if protocol.alike(group[0])), None)
        if group is None:
            groups.append(group := [])
        group.append(protocol)
    found: dict[Protocol, Protocol] = {}
    for group in groups:
        varying = [name for name in ("template", "frames") if len({getattr(one, name) for one in group}) > 1]
        found |= dict.fromkeys(group, group[0].without(varying))
    return found


def protocol_of(
    benchmark: Benchmark, variant: str, items: Sequence[Item], total: int, options: Mapping[str, Any], **how: Any
) -> Protocol:
    """The protocol of an evaluation.

    Args:
        benchmark, variant: that scored.
        items: that were asked, of `total`.
        options: of the benchmark's class, as the evaluation names them.
        how: the other fields of `Protocol`.
    """
    signature = inspect.signature(type(benchmark))
    bound = signature.bind(**options)
    bound.apply_defaults()
    defaults = {name: one.default for name, one in signature.parameters.items()}
    given = {name: value for name, value in bound.arguments.items() if name != "split"}
    departs = [f"a sample of {len(items):,} of {total:,} questions"] if len(items) < total else []
    departs += [f"variant {variant}"] if variant != benchmark.variants[0] else []
    departs += [f"{name}={json.dumps(value, default=str)}" for name, value in given.items() if value != defaults[name]]
    tokens = how.get("max_new_tokens")
    departs += [f"max_new_tokens={tokens}"] if tokens not in (None, benchmark.max_new_tokens) else []
    return Protocol(
        benchmark.name,
        variant,
        options=given,
        asked=len(items),
        total=total,
        questions=_questions(benchmark, items),
        top=benchmark.top,
        departs=tuple(departs),
        **how,
    )


def _questions(benchmark: Benchmark, items: Sequence[Item]) -> str:
    state = hashlib.sha256()
    for item in items:
        images = [[ref.path.name, ref.row, ref.column, *(ref.part or ())] for ref in item.images]
        state.update(json.dumps([item.prompt, benchmark.truth(item), images]).encode() + b"\n")
    return state.hexdigest()[:16]
