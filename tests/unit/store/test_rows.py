"""A row of a work file proves itself: no flipped bit is read as something else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.store.rows import frame, read_rows, unframe

ROWS = [
    {"mode": "image", "id": "1", "text": 'a "quoted" answer, "crc": "00000000"}'},
    {"step": 3, "loss": 0.25, "é": None},
    {"text": "one\ntwo\u2028three", "list": [1, {"a": 2}]},
]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_one_line_of_plain_json_and_reads_back(row: dict[str, object]) -> None:
    line = frame(row)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    assert {key: value for key, value in json.loads(line).items() if key != "crc"} == row
    assert unframe(line[:-1]) == row


def test_every_flipped_bit_is_seen() -> None:
    line = frame(ROWS[0])[:-1]
    for position in range(len(line)):
        for bit in range(8):
            damaged = bytearray(line)
            damaged[position] ^= 1 << bit
            assert unframe(bytes(damaged)) is None


@pytest.mark.parametrize("line", [b"", b"{}", b'{"a": 1}', b"\xff", b'{"a": 1, "crc": "zz"}', frame(ROWS[1])[:-2]])
def test_a_line_without_a_checksum_that_fits_is_none(line: bytes) -> None:
    assert unframe(line) is None


def test_damage_to_a_line_end_costs_its_two_lines_and_half_a_last_line_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    content = b"".join(map(frame, [{"a": number} for number in range(4)]))
    first = content.index(b"\n")
    path.write_bytes(content[:first] + b"\r" + content[first + 1 :] + b'{"a": 4')
    assert list(read_rows(path)) == [(1, None), (2, {"a": 2}), (3, {"a": 3})]
