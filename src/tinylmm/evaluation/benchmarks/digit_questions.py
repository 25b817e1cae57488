"""Question files: what is asked about which image, and what is true."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tinylmm.errors import DataError

FIELDS = ("question_id", "image", "text", "category", "answer", "options")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        image: path inside the source's image folder.
        text: what is asked, without the image slot.
        options: how many answers a uniform guesser chooses from.
    """

    question_id: str
    image: str
    text: str
    category: str
    answer: str
    options: int


def read_questions(path: Path, limit: int | None = None) -> list[Question]:
    """Read a JSONL question file.

    Raises:
        DataError: the file is missing, or a line is no JSON object with exactly the fields above; file and line are named.
    """
    if not path.is_file():
        raise DataError(f"question file {path} does not exist")
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        missing = [name for name in FIELDS if name not in record] if isinstance(record, dict) else list(FIELDS)
        if missing:
            raise DataError(
                f"{path}, line {number}: field {', '.join(missing)} missing; every line needs {', '.join(FIELDS)}"
            )
        questions.append(Question(**{name: record[name] for name in FIELDS}))
        if limit is not None and len(questions) == limit:
            break
    return questions
