"""Reads files of finished stages into plain records: JSON, answers, and where images lie. No torch.

A record is data, not trusted: no name in it may lead out of its folder and put some other file on a page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError
from tinylmm.evaluation.benchmarks.records import ImageRef
from tinylmm.store.layout import OUTPUT_FOLDER, SPEC_FILE, StoreLayout, stage_key


@dataclass(frozen=True)
class Generation:
    """A question with what the model answered: one line of generations.jsonl.

    Attributes:
        item_id: what tells it from the others; question ids are not unique in every benchmark.
        truth: the expected answer in words.
        score: None where it takes no part in the score.
        correct: whether it counts as right, for showing; None where nobody says what is right.
        blind_text: what the same model said without the image; None where it was not asked.
        images: as the line names them, below the evaluation's image folder.
        image_name: of the first image, for showing.
        group: of questions that are right only together (MMBench's rotations) what they share; else empty.
    """

    item_id: str
    question_id: str
    category: str
    question: str
    truth: str
    text: str
    score: float | None
    correct: bool | None
    blind_text: str | None
    blind_correct: bool | None
    images: tuple[ImageRef, ...]
    image_name: str
    named_cluster: str = ""
    group: str = ""

    @property
    def cluster(self) -> str:
        """Equal for questions about the same images: as the evaluation found, or by name in stores of earlier versions."""
        return self.named_cluster or "\n".join(ref.key for ref in self.images) or f"item {self.item_id}"

    def first_image(self, folder: Path | None, source: StoredSpec) -> ImageRef | None:
        """The first image as it was asked about; None if there is none, or as `image`."""
        return self.image(0, folder, source) if self.images else None

    def image(self, number: int, folder: Path | None, source: StoredSpec) -> ImageRef | None:
        """An image as it was asked about; None if it would lie outside `folder` against the rules."""
        if folder is None:
            return None
        named = self.images[number]
        path = (folder / named.path).resolve()
        shown = source.follow_links or path.is_relative_to(folder.resolve())
        return replace(named, path=path, upright=source.upright) if shown else None


def read_generations(path: Path) -> Iterator[Generation]:
    """Answers of an evaluation, in the order of its questions; none where there is no file.

    Raises:
        IntegrityError: a line is no answer; the message names it.
    """
    for number, row in enumerate(read_jsonl(path), start=1):
        try:
            yield _generation(row)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{path}, line {number} is no answer ({type(error).__name__}: {error})") from error


def _generation(row: dict[str, Any]) -> Generation:
    name = str(row.get("image") or "")
    images = row.get("images") or ([{"path": name}] if name else [])  # stores of earlier versions name one image
    correct = row.get("correct")
    score = row.get("score", correct)  # and say only whether an answer is right
    return Generation(
        item_id=str(row.get("item_id", row["question_id"])),
        question_id=str(row["question_id"]),
        category=str(row.get("category") or ""),
        question=str(row.get("question") or row.get("prompt") or ""),
        truth=str(row.get("truth") or ""),
        text=str(row["text"]),
        score=None if score is None else float(score),
        correct=None if correct is None else bool(correct),
        blind_text=row.get("blind_text"),
        blind_correct=None if row.get("blind_correct") is None else bool(row["blind_correct"]),
        images=tuple(map(_image_ref, images)),
        image_name=name,
        named_cluster=str(row.get("cluster") or ""),
        group=str(row.get("group") or ""),
    )


def _image_ref(one: dict[str, Any]) -> ImageRef:
    part = one.get("part")
    video = {"video": bool(one.get("video")), "part": None if part is None else (float(part[0]), float(part[1]))}
    return ImageRef(Path(one["path"]), one.get("row"), one.get("column"), **video)  # type: ignore[arg-type]


def choose_generations(generations: Iterable[Generation], limit: int) -> list[Generation]:
    """Pick up to `limit` of them, balanced over categories, then over right and wrong; what is neither comes last.

    The order within a group is that of the SHA-256 of the question's id: always the same choice, and nobody's taste.
    Holds `limit` a group at most, however long the file.
    """
    groups: dict[tuple[str, bool | None], list[tuple[int, int, Generation]]] = {}
    for index, one in enumerate(generations):
        heap = groups.setdefault((one.category, one.correct), [])
        rank = int(hashlib.sha256(one.item_id.encode()).hexdigest(), 16)
        if len(heap) < limit:
            heappush(heap, (-rank, -index, one))  # a heap of negated ranks: its head is the first to go
        elif -rank > heap[0][0]:
            heapreplace(heap, (-rank, -index, one))
    queues = {group: [one for _, _, one in sorted(heap, key=lambda item: item[:2])] for group, heap in groups.items()}
    categories = list(dict.fromkeys(category for category, _ in queues))
    chosen: list[tuple[int, Generation]] = []
    for turn in range(2 * limit):
        for position, category in enumerate(categories):
            right_first = (turn + position) % 2 == 0
            wanted = (right_first, not right_first, None)
            queue = next((queues[category, side] for side in wanted if queues.get((category, side))), None)
            if queue and len(chosen) < limit:
                chosen.append((position, queue.pop()))
    chosen.sort(key=lambda pair: (pair[0], not pair[1].correct))
    return [one for _, one in chosen]


@dataclass(frozen=True)
class StoredSpec:
    """What a finished stage's spec.json says of its inputs.

    Attributes:
        parents: role -> digest.
        root: folder of the source it read; None for the output of the stage that plays `data`.
        annotations, images: of the source, below it.
        identity: equal for evaluations of the same questions about the same images.
        follow_links, upright: whether links may lead out of `images`, and whether images are turned as their cameras say.
    """

    parents: dict[str, str]
    root: Path | None
    annotations: str
    images: str
    identity: str = ""
    follow_links: bool = False
    upright: bool = False

    def source_root(self, store_root: Path) -> Path | None:
        """The folder that `annotations` and `images` are below; None where that is not known."""
        if self.root is not None or "data" not in self.parents:
            return self.root
        return StoreLayout(store_root).stage(stage_key("data", self.parents["data"])) / OUTPUT_FOLDER

    def images_folder(self, store_root: Path) -> Path | None:
        """Where the images lie; None where that is not known."""
        root = self.source_root(store_root)
        return None if root is None else root / self.images


def read_stored_spec(folder: Path) -> StoredSpec:
    """Read spec.json of a stage's folder.

    Raises:
        IntegrityError: it is missing or not readable.
    """
    content = read_json(folder / SPEC_FILE)
    try:
        # stores of earlier versions have no location, and name the source of an evaluation in its spec
        location = (content.get("settings") or {}).get("location") or {}
        source = location.get("source") or content["spec"].get("source") or {}
        root = location.get("root")
        where = None if root is None else Path(root)
        asked = content.get("spec") or {}
        read = [asked.get("content"), asked.get("source"), content["parents"].get("data")]
        identity = json.dumps(read, sort_keys=True)
        files = (source.get("annotations") or "", source.get("images") or "")
        rules = (bool(source.get("follow_links")), source.get("orientation") == "apply")
        return StoredSpec(content["parents"], where, *files, identity, *rules)
    except (KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder / SPEC_FILE} is no stage's spec ({type(error).__name__}: {error})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        IntegrityError: the file is missing, or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise IntegrityError(f"{path} is missing. Run the same command again to make it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path} is not readable JSON ({error}). Run the same command again to make it."
        ) from error
    if not isinstance(record, dict):
        raise IntegrityError(f"{path} holds a {type(record).__name__}, not an object")
    return record


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file, none where there is no file; a last line still being written (no line end) is left out.

    Raises:
        IntegrityError: a line is not JSON.
    """
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise IntegrityError(f"{path}, line {number} is not JSON ({error})") from error
