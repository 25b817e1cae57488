"""What a plan says of cost: consistent, torch-free, and with a change that fits where nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tinylmm.config.compose import compose_all, run_name
from tinylmm.config.groups import conf_folder
from tinylmm.planning.advice import RANKS
from tinylmm.planning.estimate import optimizer_bytes
from tinylmm.planning.estimates import estimate_record
from tinylmm.planning.planner import RunPlan, plan_run
from tinylmm.sizing.cards import Calibration, cards, save_calibration

PHI = ("llm=phi2", "vt=siglip", "eval=none")


@pytest.fixture(autouse=True)
def _no_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was measured, and no GPU is here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tinylmm.planning.estimate.gpu_names", list)


def estimate(tmp_path: Path, *words: str, sweep: bool = False) -> dict[str, Any]:
    runs = compose_all([f"store={tmp_path / 'store'}", *words], sweep)
    return estimate_record([plan_run(spec, run_name(spec), overrides) for overrides, spec in runs])


def stages(tmp_path: Path, *words: str) -> dict[str, Any]:
    return {row["stage"]: row for row in estimate(tmp_path, *words)["stages"]}


def test_a_plan_says_parameters_flops_memory_disk_time_and_money_of_each_training(tmp_path: Path) -> None:
    found = stages(tmp_path, *PHI, "launch.gpu=h200", "launch.price=3")
    assert list(found) == ["pretrain", "finetune"]
    first, second = found.values()
    assert first["parameters"]["llm"] == {"total": 2_779_683_840, "trained": 0}
    assert second["parameters"]["llm"] == {"total": 2_779_683_840, "trained": 2_779_683_840}
    assert first["steps"] == 2181 and first["samples"] == 558_128
    assert first["flops_a_sample"]["vision_tower"]["backward"] == 0
    assert second["flops_a_sample"]["llm"]["backward"] == pytest.approx(
        2 * second["flops_a_sample"]["llm"]["forward"], 1e-3
    )
    for row in (first, second):
        assert row["memory"].keys() == {"local x1", "ddp x2", "zero2 x2", "zero3 x2"}
        assert row["hours"] == pytest.approx(row["seconds_a_step"] * row["steps"] / 3600)
        assert row["money"] == pytest.approx(3 * row["gpu_hours"]) and row["gpu_hours"] == row["hours"]
    assert second["disk"]["checkpoints"] == 3 * 12 * sum(part["trained"] for part in second["parameters"].values())
    assert json.loads(json.dumps(found)) == found


def test_flops_of_the_big_model_are_those_that_were_counted_by_hand(tmp_path: Path) -> None:
    """The reference's own figures: 8.79 and 14.13 TFLOP a sample of 769 and 862 tokens, by another formula."""
    row = stages(tmp_path, *PHI)["pretrain"]
    total = sum(part["forward"] + part["backward"] for part in row["flops_a_sample"].values())
    assert total * 769 / row["tokens_a_sample"] == pytest.approx(8.79e12, rel=0.02)


def test_a_sweep_counts_a_shared_training_once(tmp_path: Path) -> None:
    found = estimate(tmp_path, *PHI, "recipe=base,share", "launch.gpu=h100", sweep=True)
    names = [row["stage"] for row in found["stages"]]
    assert sorted(names) == ["finetune", "finetune", "pretrain", "share_pretrain"]
    assert found["totals"]["hours"] == pytest.approx(sum(row["hours"] for row in found["stages"]))


def test_the_cheapest_change_keeps_the_result_and_fits(tmp_path: Path) -> None:
    words = (*PHI, "launch.gpu=rtx4090")
    row = stages(tmp_path, *words)["finetune"]
    assert row["memory"]["local x1"]["fits"] is False
    change, _, rest = row["advice"].partition(" fits: ")
    assert rest.endswith(" of 22.4 GiB.")
    changed = stages(tmp_path, *words, *change.split())["finetune"]
    assert changed["memory"][changed["launch"]]["fits"] and changed["advice"] == ""
    assert changed["digest"] == row["digest"]
    assert int(change.partition("nproc=")[2].split()[0]) in RANKS


def test_where_no_launch_helps_a_larger_card_is_named(tmp_path: Path) -> None:
    words = ("llm.architecture.hidden_size=20480", "llm.architecture.num_hidden_layers=80", "launch.gpu=rtx3090")
    assert "no number of ranks" in stages(tmp_path, *PHI, *words)["finetune"]["advice"]


def test_without_a_card_a_bf16_run_says_which_cards_hold_it_and_no_hours(tmp_path: Path) -> None:
    row = stages(tmp_path, "llm=qwen2_5_0_5b", "vt=siglip", "eval=none")["finetune"]
    assert row["device"] is None and row["hours"] is None
    assert {"h100", "h200", "a100_80"} <= set(row["fitting_cards"]) <= set(cards())


def test_a_measured_machine_gives_hours_of_the_embedded_run(tmp_path: Path) -> None:
    assert stages(tmp_path)["finetune"]["hours"] is None
    save_calibration(Calibration("cpu", 16e9, 1e11, 1e11, 1e10, 90.0))
    row = stages(tmp_path)["finetune"]
    assert row["hours"] > 0 and row["device"]["images_per_s"] == 90.0
    slow = stages(tmp_path, "launch.cache_features=false")["finetune"]
    assert slow["seconds_a_step"] >= row["seconds_a_step"]
    assert slow["flops_a_sample"]["vision_tower"]["forward"] > row["flops_a_sample"]["vision_tower"]["forward"] == 0


def test_a_gpu_multiplies_fp32_at_its_own_rate(tmp_path: Path) -> None:
    fp32 = ("recipe.stages.pretrain.precision=fp32", "recipe.stages.finetune.precision=fp32", "launch.gpu=h200")
    half, whole = (stages(tmp_path, *PHI, *words)["pretrain"] for words in (("launch.gpu=h200",), fp32))
    assert whole["seconds_a_step"] > 3 * half["seconds_a_step"]


def test_what_cannot_be_known_is_said_and_the_rest_is_planned(tmp_path: Path) -> None:
    found = estimate(tmp_path, "llm=hf", "llm.pretrained=org/name", "vt=siglip", "eval=none")
    assert found["stages"] == []
    assert any("the config.json of 'org/name' is not on this machine yet" in said for said in found["unknown"])


def test_the_config_of_a_local_checkpoint_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    row = stages(tmp_path, "llm=hf", f"llm.pretrained={folder}", "vt=siglip", "eval=none")["pretrain"]
    assert row["shapes"]["llm"] == f"config.json of {folder}"
    assert row["parameters"]["llm"]["total"] == 2 * 64 * 100 + 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 2 * 64)


@pytest.mark.parametrize("connector", sorted(path.stem for path in (conf_folder() / "connector").glob("*.yaml")))
def test_every_connector_has_an_estimate(tmp_path: Path, connector: str) -> None:
    words = {
        "identity": ["vt=siglip", "llm=openelm_270m", "llm.architecture.model_dim=1152"],
        "mof_mlp": ["vt=mof"],
        "pixel_shuffle_mlp": ["vt=clip", "llm=phi2"],
    }.get(connector, ["vt=siglip", "llm=phi2"])
    found = estimate(tmp_path, f"connector={connector}", *words, "launch.gpu=l40s")
    assert found["unknown"] == [] and all(row["hours"] is not None for row in found["stages"])


@pytest.mark.parametrize("recipe", ["lora", "qlora", "full", "share", "share_factory"])
def test_every_recipe_has_an_estimate(tmp_path: Path, recipe: str) -> None:
    found = estimate(tmp_path, *PHI, f"recipe={recipe}", "launch.gpu=a100_80", "launch=zero2", "launch.nproc=8")
    assert found["unknown"] == [] and found["totals"]["gpu_hours"] == pytest.approx(8 * found["totals"]["hours"])
    names = found["stages"][-1]["memory"]
    assert ("zero3 x8" in names) is (recipe != "qlora")


def test_tiled_images_are_seen_as_often_as_they_have_tiles(tmp_path: Path) -> None:
    square, tiled = (
        stages(tmp_path, "llm=phi2", "vt=clip", "eval=none", f"vision_tower.image.mode={mode}")["finetune"]
        for mode in ("square", "anyres")
    )
    views = [row["flops_a_sample"]["vision_tower"]["forward"] for row in (square, tiled)]
    assert views[1] / views[0] == pytest.approx(5), "640 x 480: the whole image and 2 x 2 tiles"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (None, 8),
        ("adamw_torch", 8),
        ("adamw_bnb_8bit", 2),
        ("sgd", 4),
        ("lion_8bit", 1),
        ("paged_lion_32bit", 4),
        ("adamw_bf16", 4),
    ],
)
def test_state_of_an_optimiser_is_that_of_its_kind(name: str | None, size: float) -> None:
    assert optimizer_bytes(name) == size


def test_a_frozen_llm_in_eight_bits_is_said_to_be_not_exact_and_is_in_the_digest_only_where_asked(
    tmp_path: Path,
) -> None:
    def planned(*words: str) -> RunPlan:
        ((overrides, spec),) = compose_all([f"store={tmp_path}", *PHI, "eval=none", *words], False)
        return plan_run(spec, run_name(spec), overrides)

    plain, off, on = (
        planned(*words) for words in ([], ["recipe.stages.pretrain.fp8=false"], ["recipe.stages.pretrain.fp8=true"])
    )
    digests = [{stage.name: stage.digest for stage in plan.graph}["pretrain"] for plan in (plain, off, on)]
    assert digests[0] == digests[1] != digests[2]
    said = [
        any("recipe.stages.pretrain.fp8 is not exact" in word for word in plan.warnings) for plan in (plain, off, on)
    ]
    assert said == [False, False, True]


def test_an_estimate_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tinylmm.cli.main import app\n"
        "app(['plan', 'llm=phi2', 'vt=siglip', 'eval=none', 'launch.gpu=h100'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "NVIDIA H100" in done.stdout and "hours" in done.stdout


def test_the_pixel_cache_counts_where_a_training_will_fill_it(tmp_path: Path) -> None:
    def disk(*words: str) -> float:
        return float(stages(tmp_path, *PHI, "launch.cache_features=false", *words)["finetune"]["disk"]["pixels"])

    again, room = "recipe.stages.finetune.epochs=2", "launch.cache_pixels_gib=10000"
    row = stages(tmp_path, *PHI)["finetune"]
    all_images = row["samples"] * row["images_a_sample"] * 3 * 384**2
    assert disk() == disk(room) == 0, "auto: images are read once"
    assert disk(again) == 0, "auto: there is no room for all of them"
    assert disk(again, room) == disk(room, "launch.cache_pixels=true") == pytest.approx(all_images)
    assert disk(again, "launch.cache_pixels=true") == 20 * 1024**3, "as many as have room"
    assert disk(again, room, "launch.cache_pixels=false") == 0
    assert disk(again, room, "recipe.stages.finetune.max_steps=2") == 0, "it ends within the first epoch"
    frozen = ("launch.cache_features=true", "launch.cache_features_gib=1e6", "recipe.stages.finetune.epochs=2", room)
    assert stages(tmp_path, *PHI, *frozen)["pretrain"]["disk"]["pixels"] == 0, "features are kept instead"


def test_the_plan_adds_the_pixel_cache_to_its_disk(tmp_path: Path) -> None:
    words = (*PHI, "launch.cache_features=false", "launch.cache_pixels_gib=50", "launch.cache_pixels=true")
    with_cache, without = (estimate(tmp_path, *words, *off)["totals"] for off in ((), ("launch.cache_pixels=false",)))
    assert with_cache["disk"] - without["disk"] == 50 * 1024**3
