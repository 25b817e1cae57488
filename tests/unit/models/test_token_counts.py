"""How many tokens an image takes is known before a model is built, and is what the built model takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.builders import VISION, build
from tests.frozen.small_models import SMALL_MODELS
from tinylmm.config.compose import compose_run
from tinylmm.config.spec import RunSpec
from tinylmm.data.check import TokensBySize
from tinylmm.models.token_counts import tokens_by_size

PUBLISHED = ["llm=phi2", "data=llava_v1_5", "eval=none"]


def counted(run: RunSpec) -> TokensBySize | None:
    return tokens_by_size(run.vision_tower, run.connector, run.vision_tower.image, run.trust)


@pytest.mark.parametrize(
    ("words", "tokens"),
    [
        ("vt=siglip", 729),  # 27 x 27, TinyLLaVABench
        ("vt=siglip vt.drop_first_token=true", 728),  # TinyLLaVA Factory
        ("vt=clip", 576),
        ("vt=clip vt.select=all", 577),
        ("vt=clip_b16", 196),
        ("vt=dinov2", 256),
        ("vt=mof connector=mof_mlp", 512),
        ("vt=clip connector=resampler", 128),
        ("vt=siglip connector=naive_resampler", 512),  # TinyLLaVA-Video, an image too
        ("vt=siglip connector=group_resampler", 512),
        ("vt=clip connector=ldp_v2", 144),  # MobileVLM V2
        ("vt=clip vt.image.mode=anyres", 2340),  # LLaVA-1.6: 576 for the whole, then 36 rows of 48 and a newline
    ],
    ids=lambda value: str(value),
)
def test_published_towers_give_their_published_numbers(words: str, tokens: int) -> None:
    found = counted(compose_run([*PUBLISHED, *words.split()]))
    assert found is not None and found(640, 480) == tokens


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_built_model_takes_as_many(name: str) -> None:
    run = compose_run(SMALL_MODELS[name])
    found = counted(run)
    tower = run.vision_tower.model_dump(mode="json")
    parts = {key: getattr(run, key).model_dump(mode="json") for key in ("llm", "connector")}
    read = {key: tower[key] for key in ("select_layer", "select", "drop_first_token", "options")}
    model = build({"vision_tower": tower, "tower_output": read, **parts})
    assert found is not None
    assert {(w, h): found(w, h) for w, h in ((16, 16), (40, 9))} == {
        (w, h): model.tokens_of(w, h) for w, h in ((16, 16), (40, 9))
    }


def test_a_checkpoint_here_says_it_itself_and_one_that_is_not_says_nothing(tmp_path: Path) -> None:
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
    here = compose_run([*PUBLISHED, "vt=hf", f"vt.pretrained={tmp_path}", "vt.image.size=16"])
    found = counted(here)
    assert found is not None and found(5, 5) == 4
    other = compose_run([*PUBLISHED, "vt=clip", f"vt.pretrained={tmp_path}", "vt.image.size=16"])
    found = counted(other)
    assert found is not None and found(5, 5) == 4, "not the 576 of the architecture that the group brings"
    assert counted(compose_run([*PUBLISHED, "vt=hf", "vt.pretrained=org/tower"])) is None
