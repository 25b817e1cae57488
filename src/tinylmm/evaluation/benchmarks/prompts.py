"""Texts that the published scripts add to questions, and LLaVA's question files that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinylmm.evaluation.benchmarks.choice import WORD_SUFFIX
from tinylmm.evaluation.benchmarks.files import read_jsonl

SHORT_ANSWER = f"\n{WORD_SUFFIX}"
"""Suffix of VQAv2, GQA, TextVQA, POPE and MME in LLaVA's question files."""


def read_questions(path: Path) -> list[dict[str, Any]]:
    """Read a LLaVA question file: `question_id`, `image`, `text` (the finished user text) and, mostly, `category` a line.

    Raises:
        DataError: it cannot be read, or a line lacks one of the first three.
    """
    return read_jsonl(path, ("question_id", "image", "text"))


def question_in(prompt: str) -> str:
    """The question inside a stored prompt: without image slots, without the short-answer suffix, stripped."""
    return prompt.replace("<image>", "").strip().removesuffix(SHORT_ANSWER.strip()).rstrip()
