"""Questions that models were evaluated on, with the right answers and what was said to them, read from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.reports.stored import (
    Generation,
    StoredSpec,
    choose_generations,
    read_generations,
    read_stored_spec,
)
from tinylmm.store.layout import GENERATIONS_FILE, OUTPUT_FOLDER, STAGES_FOLDER, StoreLayout, model_folder, stage_key
from tinylmm.store.runs import TRAIN, read_runs


@dataclass(frozen=True)
class Question:
    """One of them.

    Attributes:
        text: as the model was asked.
        images: where its images are.
        truth: the right answer in words; empty where it is not in the benchmark's files.
        said: what each model answered in its evaluation; None where it was not asked this.
    """

    text: str
    category: str
    images: tuple[ImageRef, ...]
    truth: str
    said: tuple[str | None, ...]


@dataclass(frozen=True)
class QuestionSet:
    """Some of the questions of one evaluation, chosen to be of every category, and right and wrong ones."""

    name: str
    count: int
    """Of all its questions."""
    questions: tuple[Question, ...]


def question_sets(models: Sequence[Path], most: int) -> list[QuestionSet]:
    """What the first of the models was evaluated on, if it lies in a store; of every evaluation `most` questions.

    Args:
        models: model folders.

    Raises:
        IntegrityError: an evaluation in the store cannot be read.
    """
    first, *others = [dict(_evaluations(model)) for model in models]
    return [_set(name, folder, others, models[0], most) for name, folder in first.items()]


def _set(name: str, folder: Path, others: Sequence[dict[str, Path]], model: Path, most: int) -> QuestionSet:
    spec = read_stored_spec(folder)
    images = spec.images_folder(_store_of(model) or model)
    everything = list(read_generations(_answers(folder)))
    elsewhere = [_same(spec, evaluations) for evaluations in others]
    chosen = choose_generations(everything, most)
    wanted = {one.item_id for one in chosen}
    said = [
        {one.item_id: one.text for one in read_generations(_answers(other)) if one.item_id in wanted} if other else {}
        for other in elsewhere
    ]
    questions = tuple(
        Question(
            one.question, one.category, refs, one.truth, (one.text, *[answers.get(one.item_id) for answers in said])
        )
        for one in chosen
        if (refs := _images(one, images, spec)) is not None
    )
    return QuestionSet(name, len(everything), questions)


def _same(spec: StoredSpec, evaluations: dict[str, Path]) -> Path | None:
    """Another model's evaluation on the same questions about the same images."""
    return next((folder for folder in evaluations.values() if read_stored_spec(folder).identity == spec.identity), None)


def _evaluations(model: Path) -> Iterator[tuple[str, Path]]:
    """Name and folder of each finished evaluation of a model, as the runs of its store name them."""
    store = _store_of(model)
    if store is None:
        return
    layout, stage, seen = StoreLayout(store), model.resolve().parents[1], set()
    for run in read_runs(store):
        for row in run.stages:
            folder = layout.stage(row.key)
            if row.kind != "eval" or not row.finished or row.key in seen or not _answers(folder).is_file():
                continue
            seen.add(row.key)
            asked = read_stored_spec(folder).parents.get("model")
            if asked is not None and stage_key(TRAIN, asked) == stage.name:
                yield row.name.partition("@")[0], folder


def _store_of(model: Path) -> Path | None:
    """The store whose training stage a model folder is of; None where it is of none."""
    folder = model.resolve()
    stage = folder.parents[1]
    return stage.parents[1] if folder == model_folder(stage) and stage.parent.name == STAGES_FOLDER else None


def _answers(folder: Path) -> Path:
    return folder / OUTPUT_FOLDER / GENERATIONS_FILE


def _images(one: Generation, folder: Path | None, spec: StoredSpec) -> tuple[ImageRef, ...] | None:
    """A question's images as they were asked about; None where one is not to be had, or lies outside against the rules."""
    found = [one.image(number, folder, spec) for number in range(len(one.images))]
    refs = tuple(ref for ref in found if ref is not None and ref.path.is_file())
    return refs if len(refs) == len(one.images) else None
