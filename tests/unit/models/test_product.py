"""Every kind of LLM with every kind of tower through every connector: built, trained a step, saved, loaded, asked.

The quick suite takes a share of the product in which every two kinds meet; `python -m pytest` without marks takes all of it.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.builders import build, describe, tiny_tokenizer, tuning
from tests.reference import generate
from tests.unit.models.llms import WIDTH, choice, shrink
from tinylmm.config.groups import conf_folder
from tinylmm.constants import IMAGE_TOKEN_ID
from tinylmm.errors import ConfigError
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model
from tinylmm.models.lmm import LMM

LLMS = (
    "tinyllama",
    "phi2",
    "stablelm2",
    "qwen2_0_5b",
    "qwen3_0_6b",
    "gemma",
    "gemma2_2b",
    "gemma3_270m",
    "openelm_270m",
)
TOWERS = ("clip", "siglip", "dinov2", "dinov3", "mof")
CONNECTORS = tuple(sorted(path.stem for path in (conf_folder() / "connector").glob("*.yaml")))
SIZE, PATCH = 16, 4
SMALL_TOWER = {
    "hidden_size": WIDTH,  # so that connector=identity fits too
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": PATCH,
    "image_size": SIZE,
}
SMALL_CONNECTOR = {
    "qformer": {"num_queries": 5, "hidden_size": 16, "layers": 2, "heads": 2, "dropout": 0.0},
    "resampler": {"num_queries": 5, "heads": 2, "head_dim": 8, "depth": 1},
    "resampler_bench": {"num_queries": 5, "hidden_size": 16, "heads": 2, "depth": 1},
    "naive_resampler": {"num_queries": 5, "heads": 2, "head_dim": 8, "depth": 1},
    "group_resampler": {"num_queries": 8, "groups": 4, "heads": 2, "head_dim": 8, "depth": 1},
}
TWO_ENCODERS_ONLY = {"mof_mlp"}
SQUARE_GRID_ONLY = {"pixel_shuffle_mlp", "avgpool_mlp", "ldp", "ldp_v2"}
"""They fold the patches' grid; MoF's tokens are two grids interleaved, which is none."""


def read(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((conf_folder() / group / f"{name}.yaml").read_text(encoding="utf-8"))


def small_tower(name: str) -> dict[str, Any]:
    identity = read("vision_tower", name)
    architecture = identity["architecture"]
    for encoder in [architecture, *(value for value in architecture.values() if isinstance(value, dict))]:
        if "hidden_size" in encoder:
            encoder |= SMALL_TOWER
    identity["image"] |= {"size": SIZE}
    return identity | {"init": "random"}


def combinations() -> list[Any]:
    """All of them; those that are not needed for every two kinds to meet are marked slow."""
    cases = []
    for (i, llm), (j, tower), (k, connector) in product(*map(enumerate, (LLMS, TOWERS, CONNECTORS))):
        quick = (i + 2 * j + k) % 7 == 0
        cases.append(pytest.param(llm, tower, connector, marks=[] if quick else [pytest.mark.slow]))
    return cases


def spec_of(llm: str, tower: str, connector: str) -> dict[str, Any]:
    language = choice(llm)
    identity, part = small_tower(tower), read("connector", connector)
    output = {"drop_first_token": False, "options": {}}
    output |= {key: identity[key] for key in ("select_layer", "select", "options") if key in identity}
    return {
        "llm": {"_target_": language["_target_"], "init": "random", "architecture": shrink(language["architecture"])},
        "vision_tower": identity,
        "tower_output": output,
        "connector": part | {"options": {**part.get("options", {}), **SMALL_CONNECTOR.get(connector, {})}},
        "scale_image_features": bool(language.get("scale_image_features")),
    }


def logits(model: LMM, ids: Tensor, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        embeddings, _ = model.eval().embed(ids, pixels, None)
        return model.llm(inputs_embeds=embeddings).logits  # type: ignore[operator, no-any-return]


@pytest.mark.parametrize(("llm", "tower", "connector"), combinations())
def test_any_three_parts_make_a_model(llm: str, tower: str, connector: str, tmp_path: Path) -> None:
    spec = spec_of(llm, tower, connector)
    if (connector in TWO_ENCODERS_ONLY and tower != "mof") or (connector in SQUARE_GRID_ONLY and tower == "mof"):
        with pytest.raises(ConfigError, match="connector"):
            build(spec)
        return
    model = build(spec)
    tuning(model, {"llm": "full", "vision_tower": "frozen", "connector": "full"})
    prompt = [1] + [IMAGE_TOKEN_ID] * model.image_tokens + [5, 6, 7]
    ids = torch.tensor([[*prompt, 8, 2]])
    targets = torch.full_like(ids, -100)
    targets[0, -3:-1] = ids[0, -2:]
    pixels = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    before = logits(model, ids, pixels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()(ids, torch.arange(ids.shape[1])[None], targets, pixel_values=pixels).loss_sum.backward()
    torch.optim.SGD(trained, lr=0.1).step()
    after = logits(model, ids, pixels)
    assert after.isfinite().all() and not torch.equal(after, before)

    identities = {"llm": spec["llm"], "vision_tower": spec["vision_tower"]}
    description = describe(identities, spec["tower_output"], spec["connector"], "llama", spec["scale_image_features"])
    save_model(LoadedModel(model, tiny_tokenizer(), description, None), tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", []).model
    assert torch.equal(logits(again, ids, pixels), after)
    features = model.tower_features(pixels)
    answers = [generate(one.eval(), [prompt], features, 4, 2, 0) for one in (model, again)]
    assert answers[0] == answers[1] and len(answers[0][0]) <= 4
