"""What a model card says of a run, and questions of the run's own evaluations with their pictures. No torch.

A card is public: no path, command or name of a machine is on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.evaluation.images import open_image_ref
from tinylmm.reports.records import Evaluation, RunReport, Score
from tinylmm.reports.stored import Generation, StoredSpec, choose_generations, read_generations, read_stored_spec
from tinylmm.reports.tables import markdown_table, row_label
from tinylmm.reports.wording import ABSENT, facts, number, recipe_rows, span

PARTS = ("llm", "vision_tower")
_DATASET = re.compile(r"huggingface\.co/datasets/([\w.-]+/[\w-]+(?:\.[\w-]+)*)")
_IMAGE_TEXT = "image-text-to-text"
_SCORES = (
    "In % (MME: points). 95 %: the interval of the score, whole images drawn; blind: the same model asked without the image; "
    "chance: a uniform guess among the options; n: questions, or groups that are scored as one."
)


def base_models(spec: Mapping[str, Any]) -> list[str]:
    """Hub ids of the published parts that a run began with, from the dump of its spec."""
    parts = [spec.get(key) or {} for key in PARTS]
    named = [
        str(part["pretrained"])
        for part in parts
        if part.get("pretrained") and part.get("init", "pretrained") == "pretrained"
    ]
    return [name for name in named if _is_hub_id(name)]


def datasets(spec: Mapping[str, Any]) -> list[str]:
    """Hub ids of the data sets that a run's data say they are fetched from."""
    sources = (spec.get("data") or {}).get("sources") or {}
    said = [str(source.get("how_to_get") or "") for source in sources.values() if isinstance(source, Mapping)]
    return list(dict.fromkeys(name for text in said for name in _DATASET.findall(text)))


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def card_sections(run: RunReport, stage: str) -> list[tuple[str, str]]:
    """Titles and Markdown: results of the model that a training stage left, what it was made of, and of which data."""
    rows = [[row_label(run, row), *_cells(row.by_stage[stage])] for row in run.score_rows() if stage in row.by_stage]
    sections = []
    if rows:
        table = markdown_table(["metric", f"after {stage}", "95 %", "blind", "chance", "n"], rows)
        sections.append(("Results", f"{table}\n\n{_SCORES}"))
    else:
        sections.append(("Results", f"The run has no finished evaluation of the model after {stage}."))
    spec = run.record.spec
    parts = markdown_table(["part", "choice"], [[title, name] for title, name in facts(spec)], text_columns=2)
    recipe = [[r.name, r.data, r.trains, r.lr, r.batch, r.length] for r in recipe_rows(spec)]
    header = ["stage", "data", "trains", "learning rate", "batch", "length"]
    last = f"\n\nThis is the model after {stage}." if [r[0] for r in recipe][-1:] != [stage] else ""
    sections.append(("Recipe", f"{parts}\n\n{markdown_table(header, recipe, text_columns=4)}{last}"))
    sections.append(("Data", _data(spec)))
    return sections


def _cells(score: Score) -> list[str]:
    return [number(score.value), span(score.interval()), number(score.blind), number(score.chance), f"{score.count:,}"]


def _data(spec: Mapping[str, Any]) -> str:
    data = spec.get("data") or {}
    found = datasets(spec)
    rows = [[name, str(one.get("annotations", ABSENT))] for name, one in (data.get("sources") or {}).items()]
    # a path of the user's own says where it lies, and no more than its name is anybody else's business
    table = markdown_table(["source", "annotations"], [[name, Path(path).name] for name, path in rows], text_columns=2)
    hub = f"\n\nFrom the hub: {', '.join(found)}." if found else ""
    return f"Data set `{data.get('name', ABSENT)}`.\n\n{table}{hub}"


def hub_results(run: RunReport, stage: str) -> list[dict[str, Any]]:
    """Scores over all questions, as the hub's `EvalResult` takes them."""
    return [
        {
            "task_type": _IMAGE_TEXT,
            "dataset_type": evaluation.benchmark,
            "dataset_name": evaluation.name,
            "metric_type": score.metric,
            "metric_name": f"{score.metric}{f' ({score.mark})' if score.mark else ''}",
            "metric_value": round(score.value, 2),
        }
        for evaluation in run.evaluations
        if evaluation.stage == stage
        for score in evaluation.scores
        if score.overall
    ]


def own_questions(
    store: Path, run: RunReport, stage: str, folder: Path, limit: int
) -> tuple[str, list[tuple[str, list[Path]]]]:
    """Questions that a run's evaluations asked of a model, balanced over them and over categories, right and wrong.

    Returns:
        In words where they come from, and each question's text with the files of its pictures, written into `folder`. There
        are none where nothing was evaluated, or where the pictures are not there any more.
    """
    evaluations = [one for one in run.evaluations if one.stage == stage]
    found: list[tuple[str, list[Path]]] = []
    names = []
    for number_, evaluation in enumerate(evaluations):
        share = (limit - len(found)) // (len(evaluations) - number_)
        taken = list(_questions(store, evaluation, folder, share))
        names += [evaluation.name] if taken else []
        found += taken
    return f"questions of the run's own evaluation: {', '.join(names)}", found


def _questions(store: Path, evaluation: Evaluation, folder: Path, limit: int) -> Iterator[tuple[str, list[Path]]]:
    source = read_stored_spec(evaluation.folder)
    images = source.images_folder(store)
    for one in choose_generations(read_generations(evaluation.generations), limit):
        try:
            files = [_picture(ref, folder) for ref in _refs(one, images, source)]
        except DataError:  # deleted since, or given to this user no more: another question is as good
            continue
        if files:
            yield one.question, files


def _refs(one: Generation, images: Path | None, source: StoredSpec) -> Iterable[ImageRef]:
    first = one.first_image(images, source)
    return [first] if first is not None and len(one.images) == 1 else []


def _picture(ref: ImageRef, folder: Path) -> Path:
    path = folder / f"{len(list(folder.iterdir()))}.png"
    open_image_ref(ref).save(path)
    return path
