"""Tiled images and towers with two encoders train under ZeRO-3 and DDP as they do in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.project import Project, tiny_project
from tests.integration.test_launch import ONE_STEP_EACH, weights

TRAINED = "recipe.stages.finetune.tune.vision_tower=full"
ANYRES = ("vt.image.mode=anyres", TRAINED)
TINY = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
MOF = (
    "vt=mof",
    "connector=mof_mlp",
    "vision_tower.architecture.clip.intermediate_size=48",
    *(f"vision_tower.architecture.{part}.{key}={value}" for part in ("clip", "dinov2") for key, value in TINY.items()),
    TRAINED,
)


def with_words(project: Project, words: tuple[str, ...]) -> Project:
    """The project with these words; a tower of another kind takes the place of its own."""
    if "vt=mof" not in words:
        return Project(project.root, project.words + words)
    kept = tuple(w for w in project.words if not w.startswith(("vt=", "vision_tower.architecture.")))
    return Project(project.root, kept + words)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "launch"),
    [(ANYRES, "zero3"), (MOF, "torchrun"), (MOF, "zero3")],
    ids=["anyres-zero3", "mof-torchrun", "mof-zero3"],
)
def test_two_ranks_make_the_same_step_as_one(words: tuple[str, ...], launch: str, tmp_path: Path) -> None:
    found = []
    for name, more in (("one", ()), ("two", (f"launch={launch}", "launch.nproc=2"))):
        project = with_words(tiny_project(tmp_path / name), words)
        done = project.train(*more, *ONE_STEP_EACH)
        assert done.returncode == 0, done.stderr
        found.append(weights(project))
    one, two = found
    assert one.keys() == two.keys() and any("vision_tower" in name for name in one)
    assert ("connector/image_newline" in one) == (words is ANYRES)
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
