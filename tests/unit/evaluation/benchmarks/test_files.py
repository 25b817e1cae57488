"""Reading of benchmark files, answers and images, and joining by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.evaluation.benchmarks.qa_folders import cell, png, write_json, write_jsonl, write_parquet
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.base import ImageRef, Item, ItemScore, Scores
from tinylmm.evaluation.benchmarks.files import (
    Place,
    image_file,
    join_by_question_id,
    read_answers,
    read_json,
    read_jsonl,
    read_parquet,
)
from tinylmm.evaluation.benchmarks.pairing import join_by_prompt, unique_ids
from tinylmm.evaluation.benchmarks.prompts import question_in
from tinylmm.evaluation.benchmarks.registry import BENCHMARKS, get_benchmark

RED, BLUE = (255, 0, 0), (0, 0, 255)


class TestPlace:
    def test_a_file_is_found_in_the_folder_and_around_it(self, tmp_path: Path) -> None:
        path = write_json(tmp_path / "gqa/data/x.json", [])
        for root in (tmp_path, tmp_path / "gqa"):
            assert Place(root, "gqa", "Get it.").file("x.json", "data/x.json") == path

    def test_a_missing_file_names_itself_the_places_and_the_source(self, tmp_path: Path) -> None:
        with pytest.raises(DataError) as error:
            Place(tmp_path, "gqa", "Get it from there.").file("x.json", "data/x.json")
        places = ", ".join(str(tmp_path / name) for name in ("gqa/x.json", "gqa/data/x.json", "x.json", "data/x.json"))
        assert str(error.value) == f"x.json not found; looked for {places}. Get it from there."

    def test_a_missing_root_is_said_to_be_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="no such folder"):
            Place(tmp_path / "nowhere", "gqa", "").file("x.json")

    def test_shards_come_in_order_and_from_the_config_first(self, tmp_path: Path) -> None:
        for name in ("b/test-00001-of-00002.parquet", "b/test-00000-of-00002.parquet", "data/test-0.parquet"):
            write_parquet(tmp_path / name, [{"a": 1}])
        place = Place(tmp_path, "x", "Get it.")
        assert [p.name[:10] for p in place.parquet("test", "b")] == ["test-00000", "test-00001"]
        assert place.parquet("test")[0].parent.name == "data"
        assert not place.has_parquet("validation")
        with pytest.raises(DataError, match=r"validation-\*.parquet not found.*Get it"):
            place.parquet("validation")


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
        assert [row["text"] for row in read_answers(lines)] == ["a", ""]
        assert read_answers(lines) == read_answers(listed)
        assert read_answers(write_jsonl(tmp_path / "empty.jsonl", [])) == []

    def test_a_prompt_that_is_no_text_is_as_good_as_none(self, tmp_path: Path) -> None:
        """TinyLLaVA Factory's MMMU script writes its whole question list there."""
        row = {"question_id": "validation_Art_1", "text": "A", "prompt": [{"id": "validation_Art_1"}]}
        assert read_answers(write_jsonl(tmp_path / "a.jsonl", [row]))[0]["prompt"] is None

    @pytest.mark.parametrize("row", [{"text": "a"}, {"question_id": 1}, {"question_id": 1, "text": 3}])
    def test_a_row_that_is_no_answer_is_refused(self, tmp_path: Path, row: dict[str, object]) -> None:
        with pytest.raises(DataError, match=r"a\.jsonl"):
            read_answers(write_jsonl(tmp_path / "a.jsonl", [row]))

    def test_a_missing_answer_file_says_what_it_should_hold(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"does not exist\. .*question_id, prompt, text"):
            read_answers(tmp_path / "a.jsonl")


class TestJoining:
    ITEMS = (Item("1", 1, "a"), Item("2", 2, "b"))

    def test_ids_match_as_text_and_the_last_answer_counts(self) -> None:
        rows = [{"question_id": "2", "text": "x"}, {"question_id": 1, "text": "y"}, {"question_id": 2, "text": "z"}]
        joined = join_by_question_id(self.ITEMS, rows)
        assert {name: answer.text for name, answer in joined.items()} == {"1": "y", "2": "z"}

    def test_an_answer_to_no_question_is_refused(self) -> None:
        with pytest.raises(DataError, match="answer 1, question_id 3: no such question among the 2"):
            join_by_question_id(self.ITEMS, [{"question_id": 3, "text": "x"}])

    def test_repeated_ids_get_a_suffix(self) -> None:
        assert unique_ids(["a", "b", "a", 3, "a"]) == ["a", "b", "a#2", "3", "a#3"]

    def test_a_prompt_decides_between_questions_of_one_id(self) -> None:
        items = (Item("a", "a", "one"), Item("a#2", "a", "two"), Item("b", "b", "one"))
        rows = [
            {"question_id": "b", "text": "3"},
            {"question_id": "a", "text": "2", "prompt": "two"},
            {"question_id": "a", "text": "1", "prompt": "<image>\none"},
        ]
        joined = join_by_prompt(items, rows, question_in)
        assert {name: answer.text for name, answer in joined.items()} == {"a": "1", "a#2": "2", "b": "3"}
        with pytest.raises(DataError, match="none of its 2 questions"):
            join_by_prompt(items, [{"question_id": "a", "text": "1", "prompt": "three"}], question_in)

    def test_without_prompts_an_id_must_be_answered_as_often_as_it_is_asked(self) -> None:
        items = (Item("a", "a", "one"), Item("a#2", "a", "two"))
        rows = [{"question_id": "a", "text": "1"}, {"question_id": "a", "text": "2"}]
        assert join_by_prompt(items, rows, question_in)["a#2"].text == "2"
        with pytest.raises(DataError, match="2 questions share this id, so the answer needs the `prompt`"):
            join_by_prompt(items, rows[:1], question_in)


class TestImages:
    def test_a_file_a_cell_and_bytes_open_as_rgb(self, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(png(RED))
        assert image_file(tmp_path, "a.png", "here").open().getpixel((0, 0)) == RED
        rows = [{"id": n, "image": cell(BLUE if n == 2 else RED)} for n in range(5)]
        path = write_parquet(tmp_path / "x.parquet", rows, row_group=2)
        refs = [row.image() for row in read_parquet([path], ("id",))]
        assert [ref.open().getpixel((0, 0)) for ref in refs] == [RED, RED, BLUE, RED, RED]
        assert len({ref.key for ref in refs}) == 5
        assert ImageRef(tmp_path / "x.tsv", data=png(BLUE)).open().mode == "RGB"

    def test_bad_images_are_named_with_their_row(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "x.parquet", [{"image": {"bytes": b"no image", "path": "p"}}])
        with pytest.raises(DataError, match=r"x\.parquet#0\.image: not a readable"):
            ImageRef(path, 0, "image").open()
        with pytest.raises(DataError, match="has no row"):
            ImageRef(path, 1, "image").open()
        with pytest.raises(DataError, match="does not exist"):
            ImageRef(tmp_path / "gone.jpg").open()
        path = write_parquet(tmp_path / "y.parquet", [{"image": "text"}])
        with pytest.raises(DataError, match=r"y\.parquet, row 0: column image holds no image bytes"):
            ImageRef(path, 0, "image").open()

    def test_too_many_pixels_are_refused_in_a_cell_too(self, tmp_path: Path) -> None:
        Image.new("1", (10_000, 5_001)).save(tmp_path / "big.png")
        data = (tmp_path / "big.png").read_bytes()
        with pytest.raises(DataError, match="too large"):
            ImageRef(tmp_path / "x.tsv", data=data).open()

    @pytest.mark.parametrize("name", ["../a.jpg", "/etc/a.jpg", "", None, "a/../../b.jpg", "a\0b"])
    def test_an_image_name_cannot_leave_its_folder(self, tmp_path: Path, name: object) -> None:
        with pytest.raises(DataError, match=r"line 3: image .* must be a path inside"):
            image_file(tmp_path, name, "line 3")


class TestRegistry:
    def test_the_names_are_those_of_the_command(self) -> None:
        expected = "vqav2 gqa sqa textvqa pope mme mmmu mmvet llava_bench mmbench seed vizwiz qbench mvbench videomme"
        assert list(BENCHMARKS) == expected.split()

    @pytest.mark.parametrize("name", ["vqav2", "gqa", "textvqa", "pope", "mme", "vizwiz"])
    def test_a_benchmark_says_what_it_is(self, name: str) -> None:
        benchmark = get_benchmark(name)
        assert benchmark.name == name
        assert {"official", "llava", "lmms"} == set(benchmark.variants)
        assert benchmark.max_new_tokens == 128

    def test_a_misspelt_name_gets_a_suggestion_and_an_unknown_split_the_choice(self) -> None:
        with pytest.raises(ConfigError, match=r"'textqva' is unknown\. Did you mean 'textvqa'\?"):
            get_benchmark("textqva")
        with pytest.raises(ConfigError, match=r"no split 'dev'\. Allowed: val, test-dev, test"):
            get_benchmark("vqav2", split="dev")
        with pytest.raises(ConfigError, match="It has one split"):
            get_benchmark("pope", split="dev")


def test_the_json_has_the_question_files_own_ids(tmp_path: Path) -> None:
    items = [Item("a", "a", "?"), Item("a#2", "a", "?")]
    scores = Scores("x", "v", {"accuracy": 50.0}, (ItemScore("a", 1.0, "y"), ItemScore("a#2", 0.0)), {"scored": 2})
    assert [row["id"] for row in scores.as_json(items)["per_item"]] == ["a", "a"]
    assert [row["id"] for row in scores.as_json()["per_item"]] == ["a", "a#2"]
    assert json.loads(json.dumps(scores.as_json(items)))["aggregate"] == {"accuracy": 50.0}
