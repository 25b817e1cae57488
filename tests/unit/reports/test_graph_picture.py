"""The picture of a plan's graph."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tinylmm.errors import UserError
from tinylmm.reports.graph_picture import check_format, direct_parents, draw_graph, places


def stage(name: str, *parents: str, status: str = "todo") -> dict[str, Any]:
    return {"digest": name, "kind": "train", "name": name, "parents": list(parents), "status": status}


GRAPH = [
    stage("data", status="complete"),
    stage("pretrain", "data"),
    stage("finetune a", "data", "pretrain"),
    stage("finetune b", "data", "pretrain", status="waits"),
    stage("eval", "finetune a", "data"),
]


def test_a_stage_stands_right_of_all_its_parents() -> None:
    place = places(GRAPH)
    columns = [place[one["digest"]][0] for one in GRAPH]
    assert columns == [0, 1, 2, 2, 3]
    assert len(set(place.values())) == len(GRAPH), "no two stand in one place"


def test_only_parents_that_follow_from_no_other_are_drawn() -> None:
    assert direct_parents(GRAPH) == {
        "data": [],
        "pretrain": ["data"],
        "finetune a": ["pretrain"],
        "finetune b": ["pretrain"],
        "eval": ["finetune a"],
    }


def test_the_picture_names_every_stage_and_is_the_same_for_the_same_graph(tmp_path: Path) -> None:
    pictures = []
    for name in ("a.svg", "b.svg"):
        draw_graph({"stages": GRAPH}, tmp_path / name)
        pictures.append((tmp_path / name).read_text(encoding="utf-8"))
    assert pictures[0] == pictures[1]
    assert re.findall(r">train ([a-z ]+)<", pictures[0]) == [one["name"] for one in GRAPH]
    assert pictures[0].count("#d5ecd8") == 1 and pictures[0].count("#e3e3e8") == 1


def test_a_hostile_name_is_no_markup_and_no_formula(tmp_path: Path) -> None:
    draw_graph({"stages": [stage("$x_{1}$<script>\x1b[31m")]}, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text(encoding="utf-8")
    assert "<script>" not in text and "\x1b" not in text and r"$x_{1}$&lt;script&gt;\x1b[31m" in text


@pytest.mark.parametrize("name", ["x.dot", "x"])
def test_a_format_that_cannot_be_drawn_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"end it in \.svg, \.png, \.pdf"):
        check_format(Path(name))


def test_two_thousand_stages_can_be_drawn(tmp_path: Path) -> None:
    many = [stage("root"), *(stage(str(n), "root") for n in range(2000))]
    draw_graph({"stages": many}, tmp_path / "x.svg")
    width, height = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', (tmp_path / "x.svg").read_text()).groups()  # type: ignore[union-attr]
    assert float(height) <= 200 * 72 and float(width) > 0


def test_a_picture_in_a_folder_that_is_not_there_is_refused_before_anything_is_planned(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--graph .*nope/x\.svg: there is no folder .*nope\. Make it first"):
        check_format(tmp_path / "nope/x.svg")
