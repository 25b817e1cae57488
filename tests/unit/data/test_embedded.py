"""The embedded data set: the same bytes every time, readable by the same reader as real data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.data.embedded import build_digits
from tinylmm.data.images import open_image
from tinylmm.data.sample import Sample, read_samples
from tinylmm.errors import ConfigError

SMALL = {"pretrain": 6, "share": 3, "finetune": 5, "text": 8, "test": 4}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    summary = build_digits(folder, seed=0, **SMALL)
    assert summary["images"] == 6 + 3 + 5 + 4
    assert summary["records"]["test.jsonl"] == 4 * 6
    return folder


def test_the_same_seed_writes_the_same_bytes_over_whatever_a_killed_try_left(built: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "000001.png").write_bytes(b"half a fi")
    (tmp_path / "finetune.json").write_text("[")
    build_digits(tmp_path, seed=0, **SMALL)
    assert contents(tmp_path) == contents(built)


def test_another_seed_writes_another_data_set(built: Path, tmp_path: Path) -> None:
    build_digits(tmp_path, seed=1, **SMALL)
    other = contents(tmp_path)
    assert all(other[name] != content for name, content in contents(built).items())


def test_a_record_depends_on_its_index_and_not_on_how_many_there_are(built: Path, tmp_path: Path) -> None:
    build_digits(tmp_path, seed=0, **{name: count + 2 for name, count in SMALL.items()})
    for name in ("pretrain.json", "share_pretrain.json", "finetune.json", "text.json"):
        longer = json.loads((tmp_path / name).read_text())
        assert longer[:-2] == json.loads((built / name).read_text())


@pytest.mark.parametrize(
    ("name", "count", "turns"),
    [("pretrain.json", 6, 1), ("share_pretrain.json", 3, 1), ("finetune.json", 5, 6)],
)
def test_image_files_are_read_as_any_other_data_set(built: Path, name: str, count: int, turns: int) -> None:
    samples = list(read_samples(built / name))
    assert len(samples) == count
    for sample in samples:
        assert isinstance(sample, Sample), sample
        assert len(sample.turns) >= turns
        assert sample.turns[0].user.startswith("<image>\n")
        assert open_image(built / "images" / sample.images[0]).size == (32, 32)


def test_text_records_have_no_image_and_begin_with_the_scene_in_words(built: Path) -> None:
    for sample in read_samples(built / "text.json"):
        assert isinstance(sample, Sample), sample
        assert sample.images == ()
        described, question = sample.turns[0].user.split("\n")
        assert described
        assert question


def test_test_questions_cover_every_category_for_every_scene(built: Path) -> None:
    lines = [json.loads(line) for line in (built / "test.jsonl").read_text().splitlines()]
    assert [line["category"] for line in lines[:6]] == ["digit", "colour", "count", "yesno", "number", "choice"]
    assert len({line["question_id"] for line in lines}) == len(lines) == 24
    assert all(set(line) == {"question_id", "image", "text", "category", "answer", "options"} for line in lines)
    assert all((built / "images" / line["image"]).is_file() for line in lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"pretran": 5}, "Did you mean 'pretrain'"), ({"test": 0}, "whole number from 1"), ({"text": 2.5}, "is 2.5")],
    ids=["misspelt", "none", "fraction"],
)
def test_bad_options_are_refused_before_anything_is_written(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_digits(tmp_path, seed=0, **options)
    assert list(tmp_path.iterdir()) == []
