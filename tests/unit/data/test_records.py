"""The reader of annotation files: whatever stands at the end of a block, and what it says of broken files."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tinylmm.data import records
from tinylmm.data.records import Place, read_records
from tinylmm.errors import DataError


def some_value(draw: random.Random, depth: int = 3) -> Any:
    """Whatever JSON can hold, with texts that need escapes."""
    kinds = 7 if depth else 5
    match draw.randrange(kinds):
        case 0:
            return draw.choice([None, True, False])
        case 1:
            return draw.randrange(-(10**12), 10**12)
        case 2:
            return draw.uniform(-1e6, 1e6)
        case 3 | 4:
            return "".join(
                draw.choice(["a", '"', "\\", "\n", "é", "\U0001f600", "]", ",", " "]) for _ in range(draw.randrange(9))
            )
        case 5:
            return [some_value(draw, depth - 1) for _ in range(draw.randrange(4))]
        case _:
            return {str(number): some_value(draw, depth - 1) for number in range(draw.randrange(4))}


@pytest.mark.parametrize("block", [1, 2, 3, 5, 17, 1 << 20])
def test_a_list_read_in_blocks_of_any_size_is_the_list(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "BLOCK", block)
    draw, file = random.Random(block), tmp_path / "a.json"
    for trial in range(60):
        values = [some_value(draw) for _ in range(draw.randrange(6))]
        text = json.dumps(values, indent=draw.choice([None, 0, 2]), ensure_ascii=bool(trial % 2))
        file.write_text(text + "\n ", encoding="utf-8")
        place = Place()
        assert list(read_records(file, place=place)) == values
        assert place.share == 1.0


BROKEN = {
    "no comma": '[{"a": 1} {"b": 2}]',
    "two commas": '[{"a": 1},, {"b": 2}]',
    "comma at the end": '[{"a": 1},\n ]',
    "no end": '[{"a": 1},\n\n  {"b": 2}',
    "cut in a text": '[{"a": 1},\n {"b": "some te',
    "cut in an escape": '[{"a": 1},\n {"b": "\\ud83d',
    "something behind": '[{"a": 1}]\n {"b": 2}',
    "a word": '[{"a": 1},\n {"b": nope}]',
    "nothing behind a comma": '[{"a": 1},',
    "no list, and broken": '{"a": 1,\n "b": }',
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_a_broken_list_is_refused_where_the_whole_text_would_be(
    text: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(json.JSONDecodeError) as whole:
        json.loads(text)
    monkeypatch.setattr(records, "BLOCK", block)
    with pytest.raises(DataError, match=rf"not valid JSON \(line {whole.value.lineno}, column {whole.value.colno}: "):
        list(read_records(tmp_path / "a.json"))


def test_records_in_front_of_a_broken_one_are_handed_on(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"a": 1}, {"b": }]', encoding="utf-8")
    reader = read_records(tmp_path / "a.json")
    assert next(reader) == {"a": 1}
    with pytest.raises(DataError, match="column 18"):
        next(reader)


def test_memory_does_not_grow_with_the_list(tmp_path: Path) -> None:
    record = {"id": "x" * 40, "conversations": [{"from": "human", "value": "y" * 400}]}
    (tmp_path / "a.json").write_text(json.dumps([record] * 40_000), encoding="utf-8")
    tracemalloc.start()
    count = sum(1 for _ in read_records(tmp_path / "a.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 8 * records.BLOCK, "the file has 20 MB"
