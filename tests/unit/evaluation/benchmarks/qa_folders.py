"""Benchmark folders as their official downloads lay them out, a few questions each."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tinylmm.evaluation.benchmarks.records import Answer, Item, Scores

SHORT = "\nAnswer the question using a single word or phrase."


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=row_group)
    return path


def png(colour: tuple[int, int, int], size: tuple[int, int] = (4, 3)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def cell(colour: tuple[int, int, int]) -> dict[str, Any]:
    """An image cell as `datasets` writes it."""
    return {"bytes": png(colour), "path": "x.png"}


def said(items: Sequence[Item], *texts: str | None) -> dict[str, Answer]:
    """Answers to items in order; None leaves one out."""
    pairs = zip(items, texts, strict=True)
    return {item.item_id: Answer(text, item.prompt) for item, text in pairs if text is not None}


def answer_rows(items: Sequence[Item], texts: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a LLaVA answer file."""
    return [
        {"question_id": item.question_id, "prompt": item.prompt, "text": text, "answer_id": "x", "metadata": {}}
        for item, text in zip(items, texts, strict=True)
    ]


def values(scores: Scores) -> list[float | None]:
    return [None if row.score is None else round(row.score, 6) for row in scores.per_item]


def parsed(scores: Scores) -> list[Any]:
    return [row.parsed for row in scores.per_item]


def vqav2_folder(folder: Path, answers: Sequence[Sequence[str]]) -> Path:
    """VQAv2 val with one question for each list of reference answers; ids 1001, 1002, ..."""
    questions = [
        {"question_id": 1001 + n, "image_id": 42 + n, "question": f"What is {n}?"} for n in range(len(answers))
    ]
    annotations = [
        {
            "question_id": 1001 + n,
            "image_id": 42 + n,
            "question_type": "what is" if n % 2 else "how many",
            "answer_type": ("yes/no", "number", "other")[n % 3],
            "multiple_choice_answer": given[0],
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(given, 1)],
        }
        for n, given in enumerate(answers)
    ]
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"info": {}, "questions": questions})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    return folder


def textvqa_folder(folder: Path) -> Path:
    """Four questions about three images: two about `aa`, one without tokens."""
    asked = [("aa", "what is it?", "x, y"), ("bb", "Who?", ""), ("aa", "WHERE is it?", "z"), ("cc", "how much?", "3")]
    given = [["nokia"] * 10, ["bob"] * 3 + ["rob"] * 7, ["women's"] * 10, ["3.5"] * 2 + ["4"] * 8]
    write_jsonl(
        folder / "llava_textvqa_val_v051_ocr.jsonl",
        [
            {
                "question_id": image,
                "image": f"{image}.jpg",
                "text": f"{question.capitalize()}\nReference OCR token: {tokens}{SHORT}",
                "category": "default",
            }
            for image, question, tokens in asked
        ],
    )
    records = [
        {"image_id": image, "question_id": 34602 + n, "question": question, "answers": answers}
        for n, ((image, question, _), answers) in enumerate(zip(asked, given, strict=True))
    ]
    write_json(folder / "TextVQA_0.5.1_val.json", {"data": records[::-1]})
    return folder


def gqa_folder(folder: Path) -> Path:
    """Six questions: two verify, one choose, three query, the last of them not balanced."""
    kinds = [
        ("verify", "attr", "yes", "g1"),
        ("verify", "obj", "no", None),
        ("choose", "rel", "left", "g2"),
        ("query", "attr", "t-shirt", "g3"),
        ("query", "cat", "dog", "g3"),
        ("query", "cat", "cat", "g3"),
    ]
    records = {
        f"20{n}": {
            "question": "Is it " + "so " * n + "?",
            "answer": answer,
            "fullAnswer": answer,
            "imageId": f"n{n // 2}",
            "isBalanced": n != 5,
            "groups": {"global": group, "local": "l"},
            "types": {"structural": structural, "semantic": semantic, "detailed": "d"},
            "semantic": [
                {"operation": "select", "argument": "dog (1)", "dependencies": []},
                {"operation": "exist" if n == 0 else "relate", "argument": "?", "dependencies": [0]},
                {"operation": "query", "argument": "name", "dependencies": [1]},
            ],
            "entailed": [],
            "equivalent": [],
            "annotations": {},
        }
        for n, (structural, semantic, answer, group) in enumerate(kinds)
    }
    write_json(folder / "data/testdev_balanced_questions.json", records)
    write_jsonl(
        folder / "llava_gqa_testdev_balanced.jsonl",
        [
            {"question_id": name, "image": f"{r['imageId']}.jpg", "text": r["question"] + SHORT, "category": "default"}
            for name, r in reversed(records.items())
        ],
    )
    return folder


POPE_LABELS = {"adversarial": ("yes", "no"), "popular": ("yes", "no"), "random": ("yes", "no", "yes")}
"""Categories in LLaVA's order; two, two and three questions."""


def pope_folder(folder: Path, labels: Mapping[str, Sequence[str]] = POPE_LABELS) -> Path:
    """Questions and label files; label files are in another order than the questions."""
    start = {"adversarial": 1, "popular": 20000001, "random": 10000001}
    questions = []
    for category, given in labels.items():
        rows = [
            {
                "question_id": n + 1,
                "image": f"COCO_val2014_{n:012d}.jpg",
                "text": f"Is there a {category}?",
                "label": label,
            }
            for n, label in enumerate(given)
        ]
        write_jsonl(folder / f"coco/coco_pope_{category}.json", rows[::-1])
        questions += [
            {"question_id": start[category] + n, "image": r["image"], "text": r["text"] + SHORT, "category": category}
            for n, r in enumerate(rows)
        ]
    write_jsonl(folder / "llava_pope_test.jsonl", questions)
    return folder


def mme_folder(folder: Path) -> Path:
    """Two images in `existence` (.txt in questions_answers_YN), one in `code_reasoning` (.txt beside it)."""
    release = folder / "MME_Benchmark_release_version"
    pair = "Is it? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
    texts = {
        "existence/questions_answers_YN/a.txt": pair.replace("not? ", "not?  "),  # some have two spaces
        "existence/questions_answers_YN/b.txt": pair,
        "code_reasoning/0020.txt": pair,
    }
    for name, text in texts.items():
        path = release / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    images = ["existence/images/a.jpg", "existence/images/b.jpg", "code_reasoning/0020.png"]
    write_jsonl(
        folder / "llava_mme.jsonl",
        [
            {"question_id": image, "image": image, "text": question + SHORT, "category": "default"}
            for image in images
            for question in ("Is it?", "Is it not?")
        ],
    )
    return folder
