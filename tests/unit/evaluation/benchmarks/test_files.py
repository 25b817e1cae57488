"""Reading of benchmark files and answer files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import write_json, write_jsonl, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.files import (
    read_answer_file,
    read_json,
    read_jsonl,
    read_list,
    read_object,
    read_parquet,
)

RED, BLUE = (255, 0, 0), (0, 0, 255)


class TestReaders:
    def test_json_lines_are_cut_at_newlines_only(self, tmp_path: Path) -> None:
        path = tmp_path / "labels.json"
        path.write_text('{"text": "a\u2028b"}\r\n\n{"text": "c"}', encoding="utf-8")
        assert [row["text"] for row in read_jsonl(path)] == ["a\u2028b", "c"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"a": 1}\n{"a"', "line 2: not valid JSON"),
            ('{"b": 1}\n', "line 1: field a missing"),
            ("[1]\n", "line 1: expected an object, found list"),
        ],
    )
    def test_a_broken_line_is_named(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "x.jsonl"
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_jsonl(path, ("a",))

    def test_a_file_that_is_no_text_or_no_json_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "x.json").write_bytes(b"\xff\xfe")
        with pytest.raises(DataError, match=r"x\.json: not UTF-8"):
            read_json(tmp_path / "x.json")
        (tmp_path / "y.json").write_text("{", encoding="utf-8")
        with pytest.raises(DataError, match=r"y\.json: not valid JSON \(line 1, column 2"):
            read_json(tmp_path / "y.json")

    def test_a_list_or_an_object_is_told_from_anything_else(self, tmp_path: Path) -> None:
        listed, keyed = write_json(tmp_path / "a.json", [1]), write_json(tmp_path / "b.json", {"a": 1})
        assert (read_list(listed), read_object(keyed, "a")) == ([1], {"a": 1})
        with pytest.raises(DataError, match=r"b\.json: expected a list, found dict"):
            read_list(keyed)
        with pytest.raises(DataError, match=r"a\.json: expected an object, found list"):
            read_object(listed)
        with pytest.raises(DataError, match=r"b\.json: field c missing; needed are a, c"):
            read_object(keyed, "a", "c")

    def test_a_parquet_file_lacking_a_column_lists_what_it_has(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "x.parquet", [{"a": 1, "b": 2}])
        assert read_parquet([path], ("a",), ("c",))[0].values == {"a": 1, "c": None}
        with pytest.raises(DataError, match="column d missing; it has a, b"):
            read_parquet([path], ("a", "d"))
        path.write_bytes(b"no parquet")
        with pytest.raises(DataError, match="cannot be read as parquet"):
            read_parquet([path], ("a",))


class TestAnswerFiles:
    def test_json_lines_and_lists_read_alike_and_may_be_empty(self, tmp_path: Path) -> None:
        rows = [{"question_id": 1, "text": "a"}, {"question_id": "2", "text": None, "prompt": None}]
        lines, listed = write_jsonl(tmp_path / "a.jsonl", rows), write_json(tmp_path / "a.json", rows)
        assert [row["text"] for row in read_answer_file(lines)] == ["a", ""]
        assert read_answer_file(lines) == read_answer_file(listed)
        assert read_answer_file(write_jsonl(tmp_path / "empty.jsonl", [])) == []

    def test_a_prompt_that_is_no_text_is_as_good_as_none(self, tmp_path: Path) -> None:
        """TinyLLaVA Factory's MMMU script writes its whole question list there."""
        row = {"question_id": "validation_Art_1", "text": "A", "prompt": [{"id": "validation_Art_1"}]}
        assert read_answer_file(write_jsonl(tmp_path / "a.jsonl", [row]))[0]["prompt"] is None

    @pytest.mark.parametrize("row", [{"text": "a"}, {"question_id": 1}, {"question_id": 1, "text": 3}])
    def test_a_row_that_is_no_answer_is_refused(self, tmp_path: Path, row: dict[str, object]) -> None:
        with pytest.raises(DataError, match=r"a\.jsonl"):
            read_answer_file(write_jsonl(tmp_path / "a.jsonl", [row]))

    def test_a_missing_answer_file_says_what_it_should_hold(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"does not exist\. .*question_id, prompt, text"):
            read_answer_file(tmp_path / "a.jsonl")
