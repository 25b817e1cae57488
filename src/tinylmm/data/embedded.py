"""The embedded data set: scenes of real handwritten digits, written to disk in LLaVA's format and read like any other.

Files under the output folder:

| file | content |
|---|---|
| images/{pretrain,share,finetune,test}/*.png | scenes of 32 x 32 pixels |
| pretrain.json | image + short caption |
| share_pretrain.json | image + dense caption |
| finetune.json | image + one question of each category, in turns |
| text.json | conversations over scenes described in words, no images: for the LLM and the tokenizer |
| test.jsonl | questions over scenes of digits by writers that occur in none of the other files |
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.scenes import (
    CATEGORIES,
    Question,
    Rng,
    Scans,
    Scene,
    ask,
    caption,
    dense_caption,
    description,
    pairs,
    render,
    sample_scene,
    short_caption,
)
from tinylmm.errors import ConfigError, Fault, suggestion

log = logging.getLogger(__name__)

SCENES = {"pretrain": 6000, "share": 3000, "finetune": 4000, "text": 6000, "test": 250}
"""Records a file gets by default; `options` of the data set's `build` may change any of them."""
PAIRS_REQUEST = "list the pairs."
OPENING_SHARE = 0.4
"""Of the finetuning conversations that open with one more question of what is there."""
CAPTION_REQUESTS = ("describe the picture.", "what do you see?", "what is in the picture?")


class SceneCounts(TypedDict, total=False):
    """Records in each file."""

    pretrain: int
    share: int
    finetune: int
    text: int
    test: int


def build_digits(output: Path, seed: int, **options: Unpack[SceneCounts]) -> dict[str, Any]:
    """Write the data set; the same seed and options always give the same files.

    Args:
        output: existing folder; leftovers of an earlier try are overwritten.
        seed: seed of everything; what a record holds depends on (seed, file, index) alone.
        options: number of records per file, over `SCENES`.

    Returns:
        Number of records by file, and of images and questions in all.

    Raises:
        ConfigError: an option has an unknown name or is not a positive whole number.
    """
    counts = checked_counts(options, SCENES, "the digits scenes")
    train, held_out = Scans("train"), Scans("held_out")
    written: dict[str, Any] = {}
    captioned: tuple[tuple[str, str, Callable[[Scene, Rng], str]], ...] = (
        ("pretrain", "pretrain.json", short_caption),
        ("share", "share_pretrain.json", lambda scene, rng: dense_caption(scene)),
    )
    for split, name, say in captioned:
        records = (_captioned(split, index, seed, train, output, say) for index in range(counts[split]))
        written[name] = write_json(output / name, records)
    records = (_questioned(index, seed, train, output) for index in range(counts["finetune"]))
    written["finetune.json"] = write_json(output / "finetune.json", records)
    records = (_described(index, seed, train) for index in range(counts["text"]))
    written["text.json"] = write_json(output / "text.json", records)
    lines = [line for index in range(counts["test"]) for line in _tested(index, seed, held_out, output)]
    (output / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    written["test.jsonl"] = len(lines)
    log.info("wrote %s", ", ".join(f"{name} ({count} records)" for name, count in written.items()))
    return {"records": written, "images": sum(counts[split] for split in counts if split != "text")}


def checked_counts(options: Mapping[str, Any], defaults: Mapping[str, int], what: str) -> dict[str, int]:
    """The number of records of each part of an embedded data set: its defaults, over which options may go.

    Raises:
        ConfigError: an option has an unknown name or is not a positive whole number.
    """
    faults = []
    for name, value in options.items():
        where = f"data.build.options.{name}"
        if name not in defaults:
            fix = suggestion(name, defaults)
            faults.append(Fault(where, f"is not an option of {what}; there are {', '.join(defaults)}.", fix))
        elif not isinstance(value, int) or isinstance(value, bool) or value < 1:
            faults.append(Fault(where, f"is {value!r}; it counts records and must be a whole number from 1."))
    if faults:
        raise ConfigError(faults)
    return {**defaults, **options}


def _rng(seed: int, split: str, index: int) -> Rng:
    return np.random.default_rng([seed, list(SCENES).index(split), index])


def _draw(split: str, index: int, seed: int, scans: Scans, output: Path) -> tuple[Scene, str, Rng]:
    """Compose and write one picture; return the scene, the path under images/ and the generator to go on with."""
    rng = _rng(seed, split, index)
    scene = sample_scene(rng, scans)
    path = f"{split}/{index:06d}.png"
    target = output / "images" / path
    target.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(render(scene, scans, rng)).save(target, compress_level=1)
    return scene, path, rng


def _captioned(
    split: str, index: int, seed: int, scans: Scans, output: Path, say: Callable[[Scene, Rng], str]
) -> dict[str, Any]:
    scene, path, rng = _draw(split, index, seed, scans, output)
    request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
    turns = [(f"{IMAGE_SLOT}\n{request}", say(scene, rng))]
    return {"id": f"{split}-{index:06d}", "image": path, "conversations": conversation(turns)}


def _questioned(index: int, seed: int, scans: Scans, output: Path) -> dict[str, Any]:
    scene, path, rng = _draw("finetune", index, seed, scans, output)
    turns = [(question.text, question.answer) for question in _questions(scene, rng)]
    turns.insert(int(rng.integers(len(turns) + 1)), (PAIRS_REQUEST, pairs(scene, rng)))
    # Only the first question must be read off the image; what follows can be read off the answers above it. Whether
    # something is there was at chance on held-out images until it came first often enough.
    if rng.random() < OPENING_SHARE:
        opening = ask("yesno", scene, rng)
        turns.insert(0, (opening.text, opening.answer))
    turns[0] = (f"{IMAGE_SLOT}\n{turns[0][0]}", turns[0][1])
    return {"id": f"finetune-{index:06d}", "image": path, "conversations": conversation(turns)}


def _described(index: int, seed: int, scans: Scans) -> dict[str, Any]:
    rng = _rng(seed, "text", index)
    scene = sample_scene(rng, scans)
    turns = [(question.text, question.answer) for question in _questions(scene, rng)]
    turns.insert(int(rng.integers(len(turns) + 1)), (PAIRS_REQUEST, pairs(scene, rng)))
    if rng.random() < 0.3:
        say = caption if rng.random() < 0.7 else dense_caption
        request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
        turns[rng.integers(len(turns))] = (request, say(scene))
    turns[0] = (f"{description(scene, rng)}\n{turns[0][0]}", turns[0][1])
    return {"id": f"text-{index:06d}", "conversations": conversation(turns)}


def _tested(index: int, seed: int, scans: Scans, output: Path) -> list[dict[str, Any]]:
    scene, path, rng = _draw("test", index, seed, scans, output)
    return [
        {
            "question_id": f"{index:06d}-{question.category}",
            "image": path,
            "text": question.text,
            "category": question.category,
            "answer": question.answer,
            "options": question.options,
        }
        for question in (ask(category, scene, rng) for category in CATEGORIES)
    ]


def _questions(scene: Scene, rng: Rng) -> list[Question]:
    """Return one question of each category in random order."""
    return [ask(CATEGORIES[index], scene, rng) for index in rng.permutation(len(CATEGORIES))]


def conversation(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    """Questions and answers as LLaVA's records have them."""
    return [
        {"from": role, "value": value}
        for human, assistant in turns
        for role, value in (("human", human), ("gpt", assistant))
    ]


def write_json(path: Path, records: Iterable[dict[str, Any]]) -> int:
    """Write a JSON list with one record a line; return the number of records."""
    lines = [json.dumps(record) for record in records]
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    return len(lines)
