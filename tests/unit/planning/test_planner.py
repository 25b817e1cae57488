"""The plan as JSON, and what is said about missing files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinylmm.config.compose import compose_all, compose_run
from tinylmm.errors import ConfigError, DataError, TinyLMMError
from tinylmm.planning.planner import plan_record, plan_run, plan_runs, require_files

BF16 = ("recipe.stages.pretrain.precision=bf16", "recipe.stages.finetune.precision=bf16")


def record(tmp_path: Path, *words: str) -> dict[str, object]:
    runs = compose_all([*words, f"store={tmp_path / 'store'}"], True)
    plans = []
    for _, plan in plan_runs(runs):
        if isinstance(plan, TinyLMMError):
            raise plan
        plans.append(plan)
    return plan_record(plans)


def test_a_sweep_lists_runs_distinct_stages_and_totals(tmp_path: Path) -> None:
    plan = record(tmp_path, "seed=1,2", "recipe=base,share")
    assert list(plan)[:3] == ["runs", "stages", "totals"]
    assert [set(run) for run in plan["runs"]] == [{"name", "overrides", "stages"}] * 4  # type: ignore[attr-defined]
    assert all(set(s) == {"digest", "kind", "name", "parents", "status"} for s in plan["stages"])  # type: ignore[attr-defined]
    assert plan["totals"] == {
        "runs": 4,
        "asked": {"data": 4, "parts": 12, "images": 10, "prepare": 10, "train": 10, "eval": 10},
        "distinct": {"data": 1, "parts": 3, "images": 3, "prepare": 3, "train": 8, "eval": 8},
        "complete": {},
        "todo": {"data": 1, "parts": 3, "images": 3, "prepare": 3, "train": 8, "eval": 8},
        "waits": {},
    }
    assert json.loads(json.dumps(plan)) == plan


def test_every_stage_and_parent_of_a_run_is_listed(tmp_path: Path) -> None:
    plan = record(tmp_path)
    listed = {stage["digest"] for stage in plan["stages"]}  # type: ignore[attr-defined]
    assert set(plan["runs"][0]["stages"]) == listed  # type: ignore[index]
    assert all(set(stage["parents"]) <= listed for stage in plan["stages"])  # type: ignore[attr-defined]
    assert {stage["status"] for stage in plan["stages"]} == {"todo"}  # type: ignore[attr-defined]


def test_planning_writes_nothing(tmp_path: Path) -> None:
    record(tmp_path, "llm=phi2", "vt=siglip", "recipe=share", f"data.root={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_missing_annotations_are_each_named_with_place_and_source(tmp_path: Path) -> None:
    words = ["llm=phi2", "vt=siglip", "recipe=share", f"data.root={tmp_path}"]
    with pytest.raises(DataError) as caught:
        require_files(plan_run(compose_run(words), "run", words))
    text = str(caught.value)
    assert text.startswith("3 things needed by this run cannot be found; nothing was started.")
    assert str(tmp_path / "text_files/blip_laion_cc_sbu_558k.json") in text
    assert text.count("how to get:") == 3 and "huggingface.co" in text and "TINYLMM_DATA" in text
    assert len(text.splitlines()) < 24, "one screen"


def test_missing_images_are_counted(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this"}]
    rows = [{"id": str(i), "image": f"{i}.png", "conversations": turns} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "3.png").touch()
    words = ["llm=phi2", "vt=siglip", f"data.root={tmp_path}", f"store={tmp_path / 'store'}"]
    words += [f"data.sources.{s}.{k}" for s in ("pretrain", "finetune") for k in ("annotations=a.json", "images=.")]
    with pytest.raises(DataError, match=r"4 of 5 images of llava_v1_5/pretrain \(0\.png, 1\.png, 2\.png, \.\.\.\)"):
        require_files(plan_run(compose_run(words), "run", words))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("llm=nano",), r"the precision of the stage \S+ is fp32"),
        (BF16, r"the precision of the stage \S+ is fp32"),  # of evaluations by default
        (
            ("eval=none", *BF16, "launch.device=cpu"),
            r"launch\.device is cpu \(the precision of the stage pretrain is bf16\)",
        ),
    ],
)
def test_flash_attention_is_refused_for_a_stage_that_cannot_compute_with_it(
    words: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"launch\.attention: is flash_attention_2, .*{reason}"):
        record(tmp_path, *words, "launch.attention=flash_attention_2")


def test_flash_attention_is_planned_where_every_stage_can_compute_with_it(tmp_path: Path) -> None:
    plan = record(tmp_path, "eval=none", *BF16, "launch.attention=flash_attention_2")
    assert plan["stages"] == record(tmp_path, "eval=none", *BF16)["stages"], "it decides no result"
