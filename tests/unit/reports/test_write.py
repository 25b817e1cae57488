"""write.py and picture.py: which files come out, where, and that each is whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tinylmm.errors import UserError
from tinylmm.reports.collect import collect_report
from tinylmm.reports.picture import _picked, results_picture
from tinylmm.reports.write import write_report

from .conftest import StoreBuilder


def test_report_goes_beside_the_stages_by_default(store: StoreBuilder) -> None:
    store.whole("nano-base")
    paths = write_report(store.root)
    folder = store.root / "reports" / "nano-base"
    assert (paths.html, paths.markdown, paths.results) == tuple(
        folder / name for name in ("report.html", "report.md", "results.json")
    )
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.md", "results.json"]


def test_results_hold_format_and_rows(store: StoreBuilder) -> None:
    store.whole()
    results = json.loads(write_report(store.root).results.read_text())
    assert results["format"] == 1
    columns = {"run", "stage", "benchmark", "metric", "value", "blind", "chance", "count", "interval"}
    assert set(results["rows"][0]) == columns | {"evaluation", "limited", "protocol"}


def test_writing_again_changes_no_byte(store: StoreBuilder) -> None:
    store.whole()
    first = [path.read_bytes() for _, path in write_report(store.root).items()]
    assert [path.read_bytes() for _, path in write_report(store.root).items()] == first


def test_out_is_made_and_taken(store: StoreBuilder, tmp_path: Path) -> None:
    store.whole()
    assert write_report(store.root, out=tmp_path / "a" / "b").html == tmp_path / "a" / "b" / "report.html"


def test_out_that_is_a_file_is_refused(store: StoreBuilder, tmp_path: Path) -> None:
    store.whole()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; a report is a folder"):
        write_report(store.root, out=tmp_path / "file")


def test_many_runs_get_a_folder_name_that_fits(store: StoreBuilder) -> None:
    store.whole("run-0")
    names = ["run-0", *(f"run-{index}-" + "x" * 60 for index in range(1, 9))]
    for name in names[1:]:
        store.run(name)
    assert write_report(store.root, names).html.parent.name.startswith("run-0+8-")


def test_picture_has_the_size_a_readme_expects(store: StoreBuilder, tmp_path: Path) -> None:
    store.whole(question="What $digit$ is {it}? " * 9, text="W" * 200)
    results_picture(collect_report(store.root), tmp_path / "docs" / "results.png")
    with Image.open(tmp_path / "docs" / "results.png") as picture:
        assert picture.size == (1600, 700)


@pytest.mark.parametrize(("right_of_ten", "wrong"), [(10, 0), (9, 1), (3, 4)], ids=["all right", "most", "few"])
def test_picture_shows_wrong_answers_in_their_true_share(store: StoreBuilder, right_of_ten: int, wrong: int) -> None:
    store.images()
    store.stage("train", "finetune")
    store.evaluation("finetune", right_of_ten)
    store.run("a")
    picked = _picked(collect_report(store.root).runs[0])
    assert [example.answer.correct for example in picked] == [True] * (6 - wrong) + [False] * wrong
    assert len({example.category for example in picked}) == 4


def test_picture_of_nothing_or_of_several_is_refused(store: StoreBuilder, tmp_path: Path) -> None:
    store.stage("train", "pretrain")
    store.run("a")
    store.run("b")
    with pytest.raises(UserError, match="run 'a' has no scores yet"):
        results_picture(collect_report(store.root, ["a"]), tmp_path / "x.png")
    with pytest.raises(UserError, match="shows one run, 2 were given"):
        results_picture(collect_report(store.root, ["a", "b"]), tmp_path / "x.png")
    with pytest.raises(UserError, match=r"let the name end in \.png"):
        results_picture(collect_report(store.root, ["a"]), tmp_path / "x.jpg")
