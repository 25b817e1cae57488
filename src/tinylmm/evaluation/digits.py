"""Scoring of the embedded digits benchmark: exact match, per question type, beside chance. Pure: texts in, figures out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinylmm.evaluation.questions import Question

PROTOCOL = "digits-exact-match-v1"


@dataclass(frozen=True)
class Answered:
    """A question with what the model said, and what it said without the image (None: not asked)."""

    question: Question
    text: str
    blind_text: str | None


def normalise(text: str) -> str:
    """Lower case, no surrounding space, no full stop at the end: `" 3."` is `"3"`."""
    return text.strip().rstrip(".").strip().lower()


def is_correct(text: str, truth: str) -> bool:
    """Exact match after `normalise`; an empty answer is wrong."""
    return normalise(text) == normalise(truth) != ""


def generation_row(answered: Answered) -> dict[str, Any]:
    """One line of generations.jsonl."""
    question = answered.question
    blind = answered.blind_text
    return {
        "question_id": question.question_id,
        "image": question.image,
        "category": question.category,
        "question": question.text,
        "truth": question.answer,
        "text": answered.text,
        "correct": is_correct(answered.text, question.answer),
        "blind_text": blind,
        "blind_correct": None if blind is None else is_correct(blind, question.answer),
        "options": question.options,
    }


def score(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy in percent, overall first and then per category in alphabetical order.

    Args:
        rows: as `generation_row` makes them.

    Returns:
        One `{"metric", "value", "blind", "chance", "count"}` a line; chance is what uniform guessing among each
        question's options scores; blind is None where questions were not asked without image. No rows, no lines.
    """
    categories = sorted({row["category"] for row in rows})
    groups = [("accuracy", list(rows))] + [
        (f"accuracy/{c}", [r for r in rows if r["category"] == c]) for c in categories
    ]
    return [
        {
            "metric": name,
            "value": _percent([row["correct"] for row in group]),
            "blind": _percent([row["blind_correct"] for row in group])
            if group[0]["blind_correct"] is not None
            else None,
            "chance": _percent([1 / row["options"] for row in group]),
            "count": len(group),
        }
        for name, group in groups
        if group
    ]


def _percent(values: list[Any]) -> float:
    return round(100 * sum(values) / len(values), 4)
