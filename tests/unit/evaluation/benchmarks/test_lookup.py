"""Where benchmark files are found, and what is said of those that are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import write_json, write_parquet
from tinylmm.errors import DataError
from tinylmm.evaluation.benchmarks.lookup import BenchmarkFiles


def test_a_file_is_found_in_the_folder_and_around_it(tmp_path: Path) -> None:
    path = write_json(tmp_path / "gqa/data/x.json", [])
    for root in (tmp_path, tmp_path / "gqa"):
        assert BenchmarkFiles.under(root, "Get it.", "gqa").file("x.json", "data/x.json") == path


def test_a_missing_file_names_itself_the_paths_and_the_source(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        BenchmarkFiles.under(tmp_path, "Get it from there.", "gqa").file("x.json", "data/x.json")
    paths = ", ".join(str(tmp_path / name) for name in ("gqa/x.json", "gqa/data/x.json", "x.json", "data/x.json"))
    assert str(error.value) == f"x.json not found; looked for {paths}. Get it from there."


def test_a_missing_root_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        BenchmarkFiles.under(tmp_path / "nowhere", "", "gqa").file("x.json")


def test_shards_come_in_order_and_from_the_config_first(tmp_path: Path) -> None:
    for name in ("b/test-00001-of-00002.parquet", "b/test-00000-of-00002.parquet", "data/test-0.parquet"):
        write_parquet(tmp_path / name, [{"a": 1}])
    files = BenchmarkFiles.under(tmp_path, "Get it.", "x")
    assert [p.name[:10] for p in files.parquet("test", "b")] == ["test-00000", "test-00001"]
    assert files.parquet("test")[0].parent.name == "data"
    assert not files.has_parquet("validation")
    with pytest.raises(DataError, match=r"validation-\*.parquet not found.*Get it"):
        files.parquet("validation")


def test_the_first_spelling_of_the_folder_that_is_there_counts(tmp_path: Path) -> None:
    (tmp_path / "Q-Bench").mkdir()
    assert BenchmarkFiles.under(tmp_path, "", "qbench", "Q-Bench").folder == "Q-Bench"
    assert BenchmarkFiles.under(tmp_path / "Q-Bench", "", "qbench", "Q-Bench").folder == "Q-Bench"
    assert BenchmarkFiles.under(tmp_path / "elsewhere", "", "qbench", "Q-Bench").folder == "qbench"
