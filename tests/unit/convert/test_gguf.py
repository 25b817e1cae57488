"""What an exported GGUF file says and holds, read back, and which models are refused; llama.cpp itself is asked elsewhere."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import normalizers
from transformers import (
    CodeGenTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    GemmaTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from tests.builders import LLAMA, VISION, WIDTH, tiny_loaded
from tests.unit.convert.test_hf import loaded_with
from tests.unit.convert.tokenizers import TOKENIZERS, byte_level, isolated, sentencepiece
from tinylmm.convert.conversion import export_model, write_model
from tinylmm.convert.gguf_vocab import vocabulary_of
from tinylmm.errors import UserError
from tinylmm.models.checkpoint import LoadedModel, save_model
from tinylmm.models.connectors import LinearConnector, MLPConnector

TANH = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 8}


def written(loaded: LoadedModel, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keys and tensors of both files, dequantised."""
    write_model(loaded, folder, "gguf", dtype)
    found: dict[str, Any] = {}
    for name in ("model", "mmproj"):
        reader = gguf.GGUFReader(folder / f"{name}.gguf")
        found[name] = {key: field.contents() for key, field in reader.fields.items()}
        found[name] |= {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return found


def test_a_text_file_says_what_llama_cpp_needs_to_know(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    text = written(loaded, tmp_path / "gguf")["model"]
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 0,
        "llama.vocab_size": LLAMA["vocab_size"],
        "llama.context_length": 256,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 2,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: text[key] for key in expected} == expected
    assert text["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(text["tokenizer.ggml.tokens"]) == len(text["tokenizer.ggml.token_type"]) == LLAMA["vocab_size"]
    assert text["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert text["tokenizer.ggml.merges"]
    assert "USER: " in text["tokenizer.chat_template"]


def test_rows_of_queries_and_keys_stand_as_llama_cpp_turns_them(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    text = written(loaded, tmp_path / "gguf")["model"]
    attention = loaded.model.llm.model.layers[0].self_attn
    heads = attention.q_proj.weight.detach().reshape(4, 8, WIDTH)
    pairs = torch.stack([heads[:, :4], heads[:, 4:]], dim=2).reshape(WIDTH, WIDTH)  # a dimension, then its partner
    np.testing.assert_array_equal(text["blk.0.attn_q.weight"], pairs)
    np.testing.assert_array_equal(text["blk.0.attn_v.weight"], attention.v_proj.weight.detach())
    np.testing.assert_array_equal(text["output.weight"], loaded.model.llm.lm_head.weight.detach())


def test_a_gemmas_norms_and_images_are_what_llama_cpp_multiplies_with(tmp_path: Path) -> None:
    loaded = loaded_with(GemmaForCausalLM(GemmaConfig(**LLAMA | TANH)))
    found = written(loaded, tmp_path / "gguf")
    norm = loaded.model.llm.model.norm.weight.detach() + 1
    np.testing.assert_array_equal(found["model"]["output_norm.weight"], norm)
    assert "output.weight" not in found["model"]
    scaled = loaded.model.connector.layers[2].weight.detach() / WIDTH**0.5
    np.testing.assert_allclose(found["mmproj"]["mm.2.weight"], scaled, rtol=1e-6)


def test_a_projector_file_has_the_blocks_that_run_and_says_so(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    vision = written(loaded, tmp_path / "gguf")["mmproj"]
    expected = {
        "general.architecture": "clip",
        "general.type": "mmproj",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.use_gelu": True,
        "clip.vision.image_size": 16,
        "clip.vision.patch_size": 8,
        "clip.vision.embedding_length": 24,
        "clip.vision.feed_forward_length": 48,
        "clip.vision.attention.head_count": 2,
        "clip.vision.projection_dim": WIDTH,
        "clip.vision.block_count": 2,
        "clip.vision.feature_layer": [2],
        "clip.vision.image_mean": [0.5] * 3,
        "clip.vision.image_std": [0.5] * 3,
    }
    assert {key: vision[key] for key in expected} == expected
    tower, connector = loaded.model.vision_tower.encoder, loaded.model.connector
    last = tower.encoder.layers[1]
    np.testing.assert_array_equal(vision["v.blk.1.ffn_down.weight"], last.mlp.fc2.weight.detach())
    np.testing.assert_array_equal(vision["v.patch_embd.weight"], tower.embeddings.patch_embedding.weight.detach())
    np.testing.assert_array_equal(vision["mm.0.bias"], connector.layers[0].bias.detach())
    assert not any(name.startswith(("v.blk.2", "v.post_ln")) for name in vision)  # neither is run


@pytest.mark.parametrize("dtype", ["f32", "fp16", "bf16", "q8_0"])
def test_a_dtype_is_that_of_matrices(tmp_path: Path, dtype: str) -> None:
    save_model(tiny_loaded(), tmp_path / "ours", None, {})
    export_model(tmp_path / "ours", tmp_path / "gguf", "gguf", dtype)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "gguf/model.gguf").tensors}
    assert kinds["blk.0.ffn_up.weight"] == {"f32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["output_norm.weight"] == "F32"


def test_the_modelfile_leaves_the_chat_template_to_the_file(tmp_path: Path) -> None:
    write_model(tiny_loaded(), tmp_path / "gguf", "gguf", torch.float32)
    lines = (tmp_path / "gguf/Modelfile").read_text().splitlines()
    assert lines[:2] == ["FROM ./model.gguf", "FROM ./mmproj.gguf"]
    assert 'PARAMETER stop "</s>"' in lines and not any(line.startswith("TEMPLATE") for line in lines)


def test_what_is_seen_otherwise_is_said(tmp_path: Path) -> None:
    for mode in ("squash", "pad"):
        (note,) = write_model(
            loaded_with(tiny_loaded().model.llm, mode=mode), tmp_path / mode, "gguf", torch.float32
        ).notes
        assert "16 x 16 pixels as it is" in note and f"mode '{mode}' (bicubic)" in note


def llm(kind: Any, config: Any, **more: Any) -> Callable[[], LoadedModel]:
    return lambda: loaded_with(kind(config(**LLAMA | more)))


def joined(make: Callable[[], torch.nn.Module]) -> Callable[[], LoadedModel]:
    return lambda: loaded_with(tiny_loaded().model.llm, connector=make())


REFUSED: dict[str, tuple[Callable[[], LoadedModel], str]] = {
    "clip": (lambda: loaded_with(tiny_loaded().model.llm, "clip", "center_crop"), "cosine of 0.505"),
    "728 tokens": (lambda: loaded_with(tiny_loaded().model.llm, drop_first_token=True), "without the first 1 of 4"),
    "linear": (joined(lambda: LinearConnector(VISION["hidden_size"], WIDTH)), "this one is LinearConnector"),
    "mlp3x": (joined(lambda: MLPConnector(VISION["hidden_size"], WIDTH, depth=3)), "MLPConnector of 3 linear layers"),
    "relu": (joined(lambda: MLPConnector(VISION["hidden_size"], WIDTH, activation="relu")), "layers with ReLU"),
    "gpt2": (
        lambda: loaded_with(GPT2LMHeadModel(GPT2Config(n_embd=WIDTH, n_head=4, vocab_size=320))),
        "GPT2LMHeadModel is not",
    ),
    "activation": (llm(LlamaForCausalLM, LlamaConfig, hidden_act="gelu"), "activation is SiLU"),
    "untied": (llm(GemmaForCausalLM, GemmaConfig, **TANH, tie_word_embeddings=False), "has one of its own"),
    "rope": (
        llm(Qwen2ForCausalLM, Qwen2Config, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
        "rotary positions of type 'linear'",
    ),
    "window": (
        llm(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=True, sliding_window=8, max_window_layers=0),
        "no layer sees a sliding window",
    ),
    "qk norm": (llm(PhiForCausalLM, PhiConfig, qk_layernorm=True), "qk_layernorm=true"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_a_model_without_an_exact_form_is_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UserError, match="cannot be GGUF files") as caught:
        write_model(make(), tmp_path / "gguf", "gguf", torch.float32)
    assert reason in str(caught.value), caught.value
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_a_known_tokenizer_has_its_place_in_llama_cpp(name: str) -> None:
    found = vocabulary_of(TOKENIZERS[name]())
    pre = {"qwen2": "qwen2", "llama-3": "llama-bpe", "smollm2": "smollm", "llama-2": "default"}
    pre |= {"llama-2-new": "default", "gemma": "default"}
    assert not isinstance(found, str) and found.pre == pre.get(name, "gpt-2")
    assert bool(found.notes) == (name == "llama-2-new")


PIECES = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
PUBLISHED: dict[str, tuple[Callable[[], Any], tuple[str, str, bool]]] = {
    "qwen2": (lambda: Qwen2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]), ("gpt2", "qwen2", False)),
    "gpt2": (lambda: GPT2Tokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]), ("gpt2", "gpt-2", False)),
    "phi2": (lambda: CodeGenTokenizer(vocab={"a": 0, "<|endoftext|>": 1}, merges=[]), ("gpt2", "gpt-2", False)),
    "llama": (lambda: LlamaTokenizer(vocab=PIECES, merges=[("▁", "a")]), ("llama", "default", True)),
    "gemma": (lambda: GemmaTokenizer(vocab=PIECES, merges=[("▁", "a")]), ("llama", "default", False)),
}


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_the_tokenizer_classes_of_published_llms_have_their_places(name: str) -> None:
    make, expected = PUBLISHED[name]
    found = vocabulary_of(make())
    assert not isinstance(found, str) and (found.model, found.pre, found.prefix) == expected


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_told() -> None:
    across = byte_level(isolated(r" ?\d"))  # nothing keeps its merges from joining line breaks
    assert "no pre-tokeniser that splits text" in str(vocabulary_of(across))
    assert "no pre-tokeniser that splits text" in str(vocabulary_of(byte_level(isolated("[a-z]+"), words=False)))
    found = vocabulary_of(sentencepiece(prefix=True, every_cut=False))
    assert not isinstance(found, str) and "may split rare words" in found.notes[0]
    changed = byte_level()
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert "this tokenizer changes it first" in str(vocabulary_of(changed))


def test_a_dtype_of_another_format_and_an_unknown_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dtype: q8_0 is not written by --to hf"):
        export_model(tmp_path, tmp_path / "new", "hf", "q8_0")
    with pytest.raises(UserError, match="unknown format 'ggfu'"):
        export_model(tmp_path, tmp_path / "new", "ggfu")


def test_without_the_package_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *rest: Any) -> Any:
        if name == "gguf":
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'tinylmm\[gguf\]'"):
        write_model(tiny_loaded(), tmp_path / "gguf", "gguf", torch.float32)
