"""Pairing the rows of an answer file with items: by question id, by any other content, never by position alone.

Where a question id is not unique (TextVQA: an image's id, MME: an image's path), id and question decide together.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import Answer, Item


def unique_ids(names: Iterable[Any]) -> list[str]:
    """Item ids from question ids: the id itself, with `#2`, `#3` from its second occurrence on."""
    seen: Counter[str] = Counter()
    unique = []
    for name in map(str, names):
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def pair_by_question_id(items: Sequence[Item], rows: Sequence[Mapping[str, Any]]) -> dict[str, Answer]:
    """Match answers to items by question id (an id may be a number in one file and text in the other).

    Of an id that is answered twice the later row counts, as in LLaVA's scripts; `tinylmm score` counts such rows.

    Raises:
        DataError: an answered id belongs to no item.
    """
    return pair_by_key(items, rows, lambda item: str(item.question_id), lambda row: str(row["question_id"]))


def pair_by_key(
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Any]],
    item_key: Callable[[Item], Any],
    row_key: Callable[[Mapping[str, Any]], Any],
) -> dict[str, Answer]:
    """Match answers to items by any key of their contents; items that share a key share the answer.

    Raises:
        DataError: a row's key belongs to no item.
    """
    targets: dict[Any, list[str]] = defaultdict(list)
    for item in items:
        targets[item_key(item)].append(item.item_id)
    answers: dict[str, Answer] = {}
    for number, row in enumerate(rows, 1):
        found = targets.get(row_key(row))
        if not found:
            raise DataError(
                f"answer {number}, question_id {row['question_id']!r}: no such question among the {len(items)} of the "
                "question file. Score the answers against the question file they were made from."
            )
        answers.update(dict.fromkeys(found, Answer(row["text"], row.get("prompt"))))
    return answers


def pair_by_prompt(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]], question_of: Callable[[str], str]
) -> dict[str, Answer]:
    """Match answers to items by question id and the question inside the stored prompt.

    An id that one item alone has (`Item.other_ids`, or a question id that nothing shares) decides without a prompt. Where
    several questions share the id, the answer needs its prompt: files merged from several processes have any order.

    Args:
        items: of the benchmark.
        rows: of the answer file.
        question_of: cuts the question out of a prompt, the same way for items and rows.

    Raises:
        DataError: an id or a prompt belongs to no item, or an answer without prompt could belong to several.
    """
    by_id: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        for name in (str(item.question_id), *item.other_ids):
            by_id[name].append(item)
    seen: Counter[Any] = Counter()
    answers: dict[str, Answer] = {}
    for number, row in enumerate(rows, 1):
        name, prompt = str(row["question_id"]), row.get("prompt") or ""
        same_id = by_id.get(name, [])
        where = f"answer {number}, question_id {row['question_id']!r}"
        if not same_id:
            raise DataError(
                f"{where}: no such question among the {len(items)} of the question file. Is it another split?"
            )
        question = question_of(prompt)
        candidates = [item for item in same_id if question_of(item.prompt) == question] if prompt else same_id
        if not candidates:
            raise DataError(
                f"{where}: none of its {len(same_id)} questions is the one in the prompt, {question!r}. "
                "Score the answers against the question file they were made from."
            )
        if not prompt and len(same_id) > 1:
            raise DataError(
                f"{where}: {len(same_id)} questions share this id, so the answer needs the `prompt` that it answers."
            )
        # of questions in the same words about the same image the k-th answer takes the k-th
        turn = min(seen[name, question], len(candidates) - 1)
        seen[name, question] += 1
        answers[candidates[turn].item_id] = Answer(row["text"], row.get("prompt"))
    return answers
