"""An LMM from the identities of its parts, as the first training stage builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests import builders
from tests.builders import IMAGE_SIZE, VISION
from tests.unit.models.llms import choice, shrink, tiny_llm
from tinylmm.errors import UserError
from tinylmm.models.lmm import LMM

TOWER = {
    "_target_": "tinylmm.models.vision.HFVisionTower",
    "encoder": "transformers.SiglipVisionModel",
    "init": "random",
    "architecture": VISION,
    "image": {"size": IMAGE_SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "mode": "squash", "resample": "bicubic"},
}


def build(llm: dict[str, Any], folder: Path | None = None, **more: Any) -> LMM:
    spec = {
        "llm": llm,
        "vision_tower": TOWER,
        "tower_output": {"select_layer": -2, "select": "patch", "drop_first_token": False},
        "connector": {"_target_": "tinylmm.models.connectors.MLPConnector", "options": {}},
        **more,
    }
    return builders.build(spec, folder)


@torch.no_grad()
def test_random_and_published_llms_meet_the_same_connector(tmp_path: Path) -> None:
    """The connector is drawn from the seed alone; an LLM of a folder has the folder's weights."""
    tiny_llm("openelm", seed=5).save_pretrained(tmp_path)
    target = choice("openelm")["_target_"]
    architecture = shrink(choice("openelm")["architecture"])
    random = build({"_target_": target, "init": "random", "architecture": architecture})
    identity = {"_target_": target, "init": "pretrained", "pretrained": "(local folder)", "revision": None}
    published = build({**identity, "architecture": architecture}, tmp_path)
    from_hub_class = build({**identity, "_target_": "tinylmm.models.llm.HubCausalLM", "architecture": {}}, tmp_path)
    saved = tiny_llm("openelm", seed=5).state_dict()
    for model in (published, from_hub_class):
        assert all(torch.equal(value, saved[key]) for key, value in model.llm.state_dict().items())
        for one, other in zip(model.connector.parameters(), random.connector.parameters(), strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(random.llm.lm_head.weight, saved["lm_head.weight"])  # type: ignore[arg-type, union-attr]


@torch.no_grad()
def test_image_features_are_scaled_only_where_the_spec_says_so() -> None:
    llm = {
        "_target_": choice("gemma")["_target_"],
        "init": "random",
        "architecture": shrink(choice("gemma")["architecture"]),
    }
    plain, scaled = build(llm), build(llm, scale_image_features=True)
    features = plain.tower_features(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    ids = torch.tensor([[-200] * plain.image_tokens + [5, 6]])
    one, other = plain.embed(ids, None, features)[0], scaled.embed(ids, None, features)[0]
    torch.testing.assert_close(other[:, :-2], one[:, :-2] * 8)  # the square root of 64
    assert torch.equal(other[:, -2:], one[:, -2:])


def test_weights_that_are_not_to_be_had_are_named_with_what_to_do(tmp_path: Path) -> None:
    identity = {"_target_": "tinylmm.models.llm.HubCausalLM", "init": "pretrained", "pretrained": "x", "revision": None}
    with pytest.raises(UserError, match=r"(?s)none' cannot be loaded.*hf download.*llm\.pretrained.*llm\.init=random"):
        build({**identity, "architecture": {}}, tmp_path / "none")
