"""Which answers of two evaluations are answers to the same question: by what was asked, never by an id alone. No torch.

Ids are a file's own: two question files number their questions alike. The same question has the same words, right answer,
category and images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.images import image_digests
from tinylmm.reports.records import Evaluation
from tinylmm.reports.stored import Generation, StoredSpec, read_generations, read_stored_spec

Words = tuple[str, str, str]
"""Category, question and right answer."""
Key = tuple[str, ...]
"""The same, and what tells the images."""


@dataclass(frozen=True)
class Paired:
    """Answers to the same questions, in the first evaluation's order, and how many of both have no partner."""

    both: tuple[tuple[Generation, Generation], ...]
    alone: int


def pair_answers(store: Path, first: Evaluation, second: Evaluation) -> Paired:
    """Pair two evaluations' answers by the content of their questions.

    Where both read the same files, images are the same that have the same name in them. Elsewhere their bytes decide, and a
    question whose image is not there any more has no partner.
    """
    rows = [list(read_generations(evaluation.generations)) for evaluation in (first, second)]
    specs = [read_stored_spec(evaluation.folder) for evaluation in (first, second)]
    keys: list[list[Key | None]]
    if specs[0].identity == specs[1].identity:
        keys = [[by_name(one) for one in side] for side in rows]
    else:
        shared = {_words(one) for one in rows[0]} & {_words(one) for one in rows[1]}
        keys = [_by_bytes(store, spec, side, shared) for spec, side in zip(specs, rows, strict=True)]
    both = tuple(_matched(zip(keys[0], rows[0], strict=True), zip(keys[1], rows[1], strict=True)))
    return Paired(both, len(rows[0]) + len(rows[1]) - 2 * len(both))


def by_group(pairs: Iterable[tuple[Generation, Generation]]) -> list[tuple[Generation, Generation]]:
    """One pair for each group of questions that are right only together, with the group's score: the worst of its members.

    Args:
        pairs: answers to the same questions, all with a score.

    Returns:
        of each group the pair that shows best how the two differ.
    """
    groups: dict[str, list[tuple[Generation, Generation]]] = {}
    for x, y in pairs:
        name = f"group {x.group}" if x.group and x.group == y.group else f"item {x.item_id}"
        groups.setdefault(name, []).append((x, y))
    return [members[0] if len(members) == 1 else _as_one(members) for members in groups.values()]


def _as_one(members: Sequence[tuple[Generation, Generation]]) -> tuple[Generation, Generation]:
    first, second = (min(one.score or 0.0 for one in side) for side in zip(*members, strict=True))
    gain = second - first
    telling = [(x, y) for x, y in members if ((y.score or 0.0) - (x.score or 0.0)) * gain > 0]
    x, y = next(iter(telling or [(x, y) for x, y in members if x.text != y.text] or members))
    return replace(x, score=first), replace(y, score=second)


def _words(one: Generation) -> Words:
    return one.category, one.question, one.truth


def by_name(one: Generation) -> Key:
    """What was asked, with its images by their names: enough among evaluations that read the same files."""
    return *_words(one), *(ref.key for ref in one.images)


def _by_bytes(store: Path, spec: StoredSpec, rows: Sequence[Generation], shared: set[Words]) -> list[Key | None]:
    """Key of each question; None where its words are not shared, or an image of it cannot be found."""
    folder = spec.images_folder(store)
    wanted = [one for one in rows if _words(one) in shared and (folder is not None or not one.images)]
    refs = {} if folder is None else {ref.key: _placed(ref, folder) for one in wanted for ref in one.images}
    digests = image_digests(refs)
    found = {id(one) for one in wanted if all(ref.key in digests for ref in one.images)}
    return [(*_words(one), *(digests[ref.key] for ref in one.images)) if id(one) in found else None for one in rows]


def _placed(ref: ImageRef, folder: Path) -> ImageRef:
    return replace(ref, path=folder / ref.path)


def _matched(
    first: Iterable[tuple[Key | None, Generation]],
    second: Iterable[tuple[Key | None, Generation]],
) -> Iterable[tuple[Generation, Generation]]:
    """Pairs with equal keys; of several such the one with the same id, else the first that is left."""
    waiting: dict[Key, list[Generation]] = {}
    for key, one in second:
        if key is not None:
            waiting.setdefault(key, []).append(one)
    for key, one in first:
        partners = waiting.get(key) if key is not None else None
        if partners:
            partner = next((other for other in partners if other.item_id == one.item_id), partners[0])
            partners.remove(partner)
            yield one, partner
