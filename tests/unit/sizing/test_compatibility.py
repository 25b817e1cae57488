"""Parts that cannot work together are named when the run is planned, and only those."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tinylmm.config.groups import conf_folder
from tinylmm.sizing.compatibility import check_compatibility


def part(group: str, name: str, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    image = changes.pop("image", {})
    options = changes.pop("options", {})
    if image:
        fields["image"] |= image
    if options:
        fields["options"] |= options
    return fields | changes


def faults(tower: dict[str, Any], connector: dict[str, Any]) -> dict[str, str]:
    return {fault.where: f"{fault.what} {fault.fix}" for fault in check_compatibility(tower, connector)}


TOWERS = [path.stem for path in (conf_folder() / "vision_tower").glob("*.yaml")]


@pytest.mark.parametrize(
    "connector",
    ["mlp", "linear", "identity", "qformer", "resampler", "resampler_bench", "naive_resampler", "group_resampler"],
)
def test_what_takes_any_number_of_tokens_fits_every_tower(connector: str) -> None:
    assert not any(faults(part("vision_tower", tower), part("connector", connector)) for tower in TOWERS)


REFUSED = [
    (part("vision_tower", "clip"), part("connector", "mof_mlp"), "connector", "Set vision_tower=mof"),
    (part("vision_tower", "mof"), part("connector", "ldp"), "connector", "Take a tower with one encoder"),
    (part("vision_tower", "siglip", drop_first_token=True), part("connector", "avgpool_mlp"), "connector",
     "is avgpool_mlp, which folds a square grid"),
    (part("vision_tower", "siglip"), part("connector", "pixel_shuffle_mlp"), "connector.options.factor",
     "is 2, which does not divide the tower's grid of 27 x 27 patches. Factors that do: 3, 9, 27."),
    (part("vision_tower", "nano"), part("connector", "ldp_v2", options={"side": 12}), "connector.options.side",
     "is 12, more than the 2 x 2 patches of the tower. Set at most 2."),
    (part("vision_tower", "clip", image={"mode": "anyres"}), part("connector", "qformer"), "vision_tower.image.mode",
     "needs a square grid of tokens from each tile"),
    (part("vision_tower", "mof", image={"mode": "anyres"}), part("connector", "mlp"), "vision_tower.image.mode",
     "Take a tower with one encoder"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("tower", "connector", "where", "message"), REFUSED, ids=[r[2] + "-" + r[3][:12] for r in REFUSED]
)
def test_what_cannot_fit_is_a_fault_with_what_to_change(
    tower: dict[str, Any], connector: dict[str, Any], where: str, message: str
) -> None:
    found = faults(tower, connector)
    assert list(found) == [where] and message in found[where]


def test_what_fits_after_the_change_is_no_fault() -> None:
    siglip, clip = part("vision_tower", "siglip"), part("vision_tower", "clip")
    assert not faults(siglip, part("connector", "pixel_shuffle_mlp", options={"factor": 3}))
    assert not faults(clip, part("connector", "pixel_shuffle_mlp"))
    assert not faults(part("vision_tower", "mof"), part("connector", "mof_mlp"))
    assert not faults(part("vision_tower", "clip", image={"mode": "anyres"}), part("connector", "avgpool_mlp"))


def test_tiles_in_one_stage_are_judged_as_tiles_in_all() -> None:
    stages = {"pretrain": {"image_mode": "square"}, "finetune": {"image_mode": "anyres"}, "broken": 3}
    clip = part("vision_tower", "clip")
    assert not check_compatibility(clip, part("connector", "mlp"), stages)
    (fault,) = check_compatibility(clip, part("connector", "resampler"), stages)
    assert fault.where == "recipe.stages.finetune.image_mode" and "a square grid of tokens" in fault.what


def test_classes_of_others_and_broken_values_are_left_to_those_who_judge_them() -> None:
    foreign = part("vision_tower", "clip", _target_="my_towers.Tower")
    assert not faults(foreign, part("connector", "mof_mlp"))
    assert not faults(part("vision_tower", "clip", image={"size": "x"}), part("connector", "ldp_v2"))
    assert not faults({}, {}) and not faults({"_target_": 3}, part("connector", "mof_mlp"))
