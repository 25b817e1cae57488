"""Checkpoints of the Factory with its other LLMs, towers and connectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model, GemmaConfig, GemmaForCausalLM

from tests.builders import LLAMA, VISION, VOCAB, WIDTH
from tests.foreign import Foreign, factory_config, factory_tensors, foreign, load_imported, our_logits, write_merged
from tinylmm.convert.connectors import QFORMER, RESAMPLER, connector_of, from_ours
from tinylmm.convert.conversion import import_model, write_model
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig
from tinylmm.models.query_connectors import PerceiverConnector, QFormerConnector

BEFORE, AFTER = [5, 6, 7], [8, 9, 10, 11]


def same_logits(parts: Foreign, loaded: LoadedModel, size: int = 16) -> None:
    pixels = torch.randn(1, 3, size, size)
    found = our_logits(loaded, BEFORE, pixels, AFTER)
    torch.testing.assert_close(found, parts.logits(BEFORE, pixels, AFTER), atol=1e-5, rtol=0)


def imported(tmp_path: Path, parts: Foreign, **config: Any) -> LoadedModel:
    tensors = {k: v for k, v in factory_tensors(parts).items() if not k.startswith("connector.")}
    spec = {"resampler": RESAMPLER, "qformer": QFORMER}.get(config.get("connector_type", ""))
    connector = (
        parts.connector_tensors() if spec is None else from_ours(connector_of(spec, {}), parts.connector_tensors())
    )
    tensors |= {f"connector._connector.{k}": v for k, v in connector.items() if "bert.layernorm" not in k}
    if spec == QFORMER:  # as its trainer saves it
        tensors["connector._connector.bert.embeddings.position_ids"] = torch.arange(512)[None]
    write_merged(tmp_path / "factory", factory_config(parts, **config), tensors)
    loaded, _ = load_imported(tmp_path / "factory", tmp_path / "model", template="llama")
    return loaded


def test_a_perceiver_resampler_comes_in(tmp_path: Path) -> None:
    parts = foreign()
    parts.mlp = PerceiverConnector(VISION["hidden_size"], WIDTH, num_queries=5, depth=2).eval()
    loaded = imported(tmp_path, parts, connector_type="resampler", num_queries=5, num_resampler_layers=2)
    same_logits(parts, loaded)
    assert loaded.model.image_tokens == 5


def test_a_mixture_of_features_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'mof_mlp', which cannot be imported.*naiveresampler and groupresampler\."):
        imported(tmp_path, foreign(), connector_type="mof_mlp")


@pytest.mark.slow
def test_a_q_former_comes_in_though_its_queries_have_no_norm_there(tmp_path: Path) -> None:
    parts = foreign()
    parts.mlp = QFormerConnector(VISION["hidden_size"], WIDTH, num_queries=5).eval()
    del_norm = {k: v for k, v in parts.connector_tensors().items() if not k.startswith("qformer.layernorm")}
    parts.connector_tensors = lambda: del_norm  # type: ignore[method-assign]
    same_logits(parts, imported(tmp_path, parts, connector_type="qformer", num_queries=5))


def test_openelm_comes_in_goes_out_and_comes_in_equal(tmp_path: Path) -> None:
    parts = foreign()
    shape = {"model_dim": WIDTH, "num_transformer_layers": 2, "head_dim": 8, "vocab_size": VOCAB, "ffn_dim_divisor": 8}
    parts.llm = OpenELMForCausalLM(OpenELMConfig(**shape, share_input_output_layers=True)).eval()
    loaded = imported(tmp_path, parts)
    same_logits(parts, loaded)
    write_model(loaded, tmp_path / "back", "factory", torch.float32)
    import_model(tmp_path / "back", tmp_path / "again")
    before, after = loaded.model.state_dict(), load_model(tmp_path / "again", []).model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_gemma_scales_image_features_as_it_was_trained_and_exports_so(tmp_path: Path) -> None:
    parts = foreign()
    torch.manual_seed(1)
    parts.llm = GemmaForCausalLM(GemmaConfig(**LLAMA, head_dim=8)).eval()
    loaded = imported(tmp_path, parts)
    with torch.no_grad():  # what transformers 4 did inside the model
        last = parts.mlp[2]
        last.weight *= WIDTH**0.5
        last.bias *= WIDTH**0.5
    same_logits(parts, loaded)
    report = write_model(loaded, tmp_path / "hf", "hf", torch.float32)
    assert report.difference is not None and report.difference < 1e-5


def test_dinov2_comes_in_with_its_own_crop(tmp_path: Path) -> None:
    parts = foreign()
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8)
    parts.encoder = Dinov2Model(config).eval()
    for parameter in parts.encoder.parameters():
        nn.init.normal_(parameter, std=0.3)
    parts.tower_tensors = lambda: {k: v.clone() for k, v in parts.encoder.state_dict().items()}  # type: ignore[method-assign]
    loaded = imported(tmp_path, parts, vision_model_name_or_path="facebook/dinov2-large")
    same_logits(parts, loaded, size=224)
    assert loaded.description.image.short_edge == 256 and loaded.model.image_tokens == (224 // 8) ** 2
