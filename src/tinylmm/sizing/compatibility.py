"""Whether the shipped parts fit each other, as far as the spec alone can tell: said when planning, not an hour later.

A part's own class checks the same when it is built, and classes of other packages are left to that alone. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinylmm.errors import Fault

_PAIRS = "MoFMLPConnector"
_SHUFFLE = "PixelShuffleMLPConnector"
_GRIDS = (_SHUFFLE, "AveragePoolMLPConnector", "LDPConnector", "LDPv2Connector")
_QUERIES = (
    "QFormerConnector",
    "PerceiverConnector",
    "BenchResamplerConnector",
    "NaiveResamplerConnector",
    "GroupResamplerConnector",
)
_MIXTURE = "MoFTower"


def check_compatibility(
    tower: Mapping[str, Any], connector: Mapping[str, Any], stages: Mapping[str, Any] | None = None
) -> list[Fault]:
    """Return why the tower's tokens cannot go through the connector.

    Args:
        tower, connector: the two parts of the composed spec, as plain data.
        stages: of the recipe, of which each may have an image mode of its own.
    """
    kind, connector_kind = _kind(tower), _kind(connector)
    faults = []
    if connector_kind == _PAIRS and kind == "HFVisionTower":
        what = "is mof_mlp, which takes tokens of two encoders, but this tower has one."
        faults.append(Fault("connector", what, "Set vision_tower=mof, or choose connector=mlp."))
    if connector_kind in _GRIDS:
        faults += _check_grid(tower, connector)
    asked = {"vision_tower.image.mode": (tower.get("image"), "mode")}
    asked |= {f"recipe.stages.{name}.image_mode": (stage, "image_mode") for name, stage in (stages or {}).items()}
    modes = {where: part.get(key) for where, (part, key) in asked.items() if isinstance(part, Mapping)}
    gridless = kind == _MIXTURE or connector_kind in (*_QUERIES, _PAIRS) or _breaks_grid(tower)
    if gridless:
        what = "is anyres, which needs a square grid of tokens from each tile, but these parts give none."
        fix = "Take a tower with one encoder, select=patch, drop_first_token=false and connector=mlp."
        faults += [Fault(where, what, fix) for where, mode in modes.items() if mode == "anyres"]
    return faults


def _check_grid(tower: Mapping[str, Any], connector: Mapping[str, Any]) -> list[Fault]:
    name = connector.get("name")
    if _kind(tower) == _MIXTURE or _breaks_grid(tower):
        what = f"is {name}, which folds a square grid of patches, but this tower's tokens are none."
        fix = "Take a tower with one encoder, select=patch and drop_first_token=false, or choose connector=mlp."
        return [Fault("connector", what, fix)]
    side = _side(tower)
    options = connector.get("options")
    if side is None or not isinstance(options, Mapping):
        return []
    factor, pooled = options.get("factor"), options.get("side")
    if _kind(connector) == _SHUFFLE and isinstance(factor, int) and factor >= 1 and side % factor:
        fitting = ", ".join(str(number) for number in range(2, side + 1) if side % number == 0)
        what = f"is {factor}, which does not divide the tower's grid of {side} x {side} patches."
        return [Fault("connector.options.factor", what, f"Factors that do: {fitting or 'none'}.")]
    if isinstance(pooled, int) and pooled > side:
        what = f"is {pooled}, more than the {side} x {side} patches of the tower."
        return [Fault("connector.options.side", what, f"Set at most {side}.")]
    return []


def _kind(part: Mapping[str, Any]) -> str:
    """Class name of a part of ours; empty for any other, which is judged when it is built."""
    target = part.get("_target_")
    return target.rpartition(".")[2] if isinstance(target, str) and target.startswith("tinylmm.") else ""


def _breaks_grid(tower: Mapping[str, Any]) -> bool:
    """Whether a token is taken from the grid. A CLS token kept is not seen here: not every encoder has one."""
    return tower.get("drop_first_token") is True


def _side(tower: Mapping[str, Any]) -> int | None:
    """Patches along the edge of the tower's grid, where the spec says it."""
    image, architecture = tower.get("image"), tower.get("architecture")
    if not isinstance(image, Mapping) or not isinstance(architecture, Mapping):
        return None
    size, patch = image.get("size"), architecture.get("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int) or min(size, patch) < 1:
        return None
    return size // patch
