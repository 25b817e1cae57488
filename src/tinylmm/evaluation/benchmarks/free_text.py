"""Scoring of the benchmarks whose answers are free text with ten references: VQAv2, TextVQA, VizWiz."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tinylmm.evaluation.benchmarks.base import Benchmark
from tinylmm.evaluation.benchmarks.records import Answer, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.scoring import Metrics, count_items, graded
from tinylmm.evaluation.benchmarks.vqa_text import clean, m4c_text, official_text, soft_accuracy

Rule = Callable[[str, Sequence[str]], tuple[str, float]]
"""Answer and references -> the answer as compared, and its accuracy in [0, 1]."""


@dataclass(frozen=True)
class FreeTextReference:
    """What people answered.

    Attributes:
        answers: one an annotator; empty where the split's answers are hidden.
        groups: results are broken down by these, e.g. `{"answer_type": "yes/no"}`.
        upload_list: file with all questions that the server wants answers to; None where the split has no server.
    """

    answers: tuple[str, ...] = ()
    groups: Mapping[str, str] | None = None
    upload_list: Path | None = None

    def __str__(self) -> str:
        """The answers in words, most frequent first: `red (8), dark red (2)`; nothing where they are hidden."""
        counted = Counter(self.answers).most_common()
        return ", ".join(answer if len(counted) == 1 else f"{answer} ({count})" for answer, count in counted)


def official_rule(text: str, references: Sequence[str]) -> tuple[str, float]:
    """VQA's own rule: where all references are equal, nothing is normalised ("Yes" is wrong against ten "yes")."""
    cleaned = [clean(reference) for reference in references]
    if len(set(cleaned)) <= 1:
        return clean(text), soft_accuracy(clean(text), cleaned)
    return always_rule(text, cleaned)


def uploaded_rule(text: str, references: Sequence[str]) -> tuple[str, float]:
    """LLaVA's protocol: the answer is put through m4c before the upload, the server applies its own rule."""
    return official_rule(m4c_text(text), references)


def always_rule(text: str, references: Sequence[str]) -> tuple[str, float]:
    """lmms-eval on VQAv2: the official normalisation of both sides, whatever the references."""
    parsed = official_text(text)
    return parsed, soft_accuracy(parsed, [official_text(reference) for reference in references])


def m4c_rule(text: str, references: Sequence[str]) -> tuple[str, float]:
    """TextVQA everywhere, and lmms-eval on VizWiz: m4c on both sides."""
    parsed = m4c_text(text)
    return parsed, soft_accuracy(parsed, [m4c_text(reference) for reference in references])


def score_free_text(
    benchmark: Benchmark, items: Sequence[Item], answers: Mapping[str, Answer], variant: str, rule: Rule
) -> Scores:
    """Score by `rule`: `accuracy` in percent, then one metric a group. A missing answer scores 0.

    Items without references (hidden answers) take no part; where all are such, there is no metric, and `hidden` counts them.
    """
    rows = [_score_item(item, answers.get(item.item_id), rule) for item in items]
    hidden = sum(row.score is None for row in rows)
    counts = count_items(items, answers, rows, **({"hidden": hidden} if hidden else {}))
    metrics, found = Metrics(), graded(items, rows)
    if found:
        metrics.mean("accuracy", found)
        for label in sorted({label for item, _ in found for label in item.reference.groups or ()}):
            metrics.means_by(label, found, partial(_group, label), ordered=True)
    return Scores(benchmark.name, variant, metrics.aggregate, tuple(rows), counts, metrics.bases)


def _group(label: str, item: Item) -> str:
    return str((item.reference.groups or {}).get(label, ""))


def _score_item(item: Item, answer: Answer | None, rule: Rule) -> ItemScore:
    references = item.reference.answers
    if not references:
        return ItemScore(item.item_id, None, None if answer is None else m4c_text(answer.text) or None)
    if answer is None:
        return ItemScore(item.item_id, 0.0)
    parsed, accuracy = rule(answer.text, references)
    # nothing but white space: nothing was read, though the rule may still match the reference "a", which is nothing, too
    return ItemScore(item.item_id, accuracy, parsed if answer.text.strip() else None)


def answer_texts(value: Any) -> tuple[str, ...]:
    """The answers of a record: a list of texts, a list of `{"answer": ...}`, or parquet's `{"answer": [...]}`."""
    if isinstance(value, dict):
        value = value.get("answer")
    return tuple(str(entry["answer"] if isinstance(entry, dict) else entry) for entry in value or ())
