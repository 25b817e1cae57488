"""Exported GGUF files in llama.cpp: loaded, asked, and held against our own engine's tokens, answers and probabilities."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

import tinylmm
from tests.builders import IMAGE_SIZE, LLAMA, WIDTH, redescribe
from tests.elsewhere.environments import node_with
from tests.integration.project import environment
from tests.integration.test_export_elsewhere import TANH
from tests.unit.convert.test_hf import loaded_with
from tests.unit.convert.tokenizers import TOKENIZERS
from tinylmm.constants import IMAGE_SLOT, IMAGE_TOKEN_ID
from tinylmm.convert.conversion import export_model, write_model
from tinylmm.convert.gguf_vocab import vocabulary_of
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.images import ImageTransform
from tinylmm.models.checkpoint import LoadedModel, save_model
from tinylmm.models.devices import DTYPES
from tinylmm.models.openelm import OpenELMForCausalLM
from tinylmm.models.openelm_config import OpenELMConfig

SCRIPT = Path(__file__).parents[1] / "elsewhere/ask_gguf.js"
MARKER = "<__media__>"
QUESTIONS = ["which colour?", "is there a 3, and what's the digit behind it?", "what?"]
TEXTS = [
    "what is it?",
    "a 3, 12 and 007; x3y 4z",
    "it's WE'LL they'RE  two   spaces",
    "\n\nlines\n \n3\t4\t 5",
    "ünïcödé 日本語 😶 end",
    " lead and trail ",
]
TALK = [Turn(QUESTIONS[0], "a red 3"), Turn(QUESTIONS[2], None)]
TOKENS = 6
TOLERANCE = 1e-3
"""Of log-probabilities: llama.cpp's GELU between the connector's layers is the tanh one, and it keeps tables in fp16."""
HEADS = {"head_dim": 8, "hidden_activation": TANH}
GEMMA2 = HEADS | {"query_pre_attn_scalar": 8, "sliding_window": 24}
OPENELM = {
    "vocab_size": LLAMA["vocab_size"],
    "num_transformer_layers": 3,
    "model_dim": WIDTH,
    "head_dim": 8,
    "qkv_multipliers": [0.5, 1.0],
    "num_gqa_groups": 2,
    "ffn_multipliers": [0.5, 4.0],
    "ffn_dim_divisor": 16,
    "normalize_qk_projections": True,
    "share_input_output_layers": True,
    "max_context_length": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def drawn(llm: nn.Module) -> nn.Module:
    """Weights large enough that answers differ; norms and biases of ones and zeros would hide what is done to them."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.copy_(parameter * 3 if parameter.dim() > 1 else parameter + 0.3 * torch.randn(parameter.shape))
    return llm


def of(kind: Callable[..., nn.Module], config: Callable[..., Any], **more: Any) -> Callable[[], LoadedModel]:
    def make() -> LoadedModel:
        torch.manual_seed(3)
        return loaded_with(drawn(kind(config(**LLAMA | more))), mode="pad")

    return make


def with_tokenizer(name: str) -> LoadedModel:
    tokenizer = TOKENIZERS[name]()
    loaded = of(LlamaForCausalLM, LlamaConfig, vocab_size=len(tokenizer) + 5)()
    loaded.tokenizer = tokenizer
    with torch.no_grad():  # special tokens, and bytes that are no text, are shown in other ways by the two programs
        for token, number in tokenizer.get_vocab().items():
            if token.startswith("<"):
                loaded.model.llm.lm_head.weight[number] = 0
    return loaded


def openelm() -> LoadedModel:
    torch.manual_seed(3)
    loaded = loaded_with(drawn(OpenELMForCausalLM(OpenELMConfig(**OPENELM))), mode="pad")
    redescribe(loaded, llm={"_target_": "tinylmm.models.openelm.OpenELMForCausalLM"})
    return loaded


MODELS: dict[str, Callable[[], LoadedModel]] = {
    "llama": of(LlamaForCausalLM, LlamaConfig),
    "llama3": of(LlamaForCausalLM, LlamaConfig, rope_parameters=LLAMA3, attention_bias=True, tie_word_embeddings=True),
    "qwen2": of(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True),
    "qwen3": of(Qwen3ForCausalLM, Qwen3Config, head_dim=16),
    "gemma": of(GemmaForCausalLM, GemmaConfig, **HEADS),
    "gemma2": of(Gemma2ForCausalLM, Gemma2Config, **GEMMA2),
    "gemma3": of(Gemma3ForCausalLM, Gemma3TextConfig, **GEMMA2 | {"num_hidden_layers": 7}),
    "phi2": of(PhiForCausalLM, PhiConfig, num_key_value_heads=4),
    "stablelm2": of(StableLmForCausalLM, StableLmConfig, use_qkv_bias=True),
    "openelm": openelm,
    "llama-2-tokenizer": lambda: with_tokenizer("llama-2"),
    "nano-tokenizer": lambda: with_tokenizer("nano"),
}


def row_of(loaded: LoadedModel, turns: list[Turn]) -> list[int]:
    """Ids of a prompt, with as many of an image as it has tokens."""
    ids = get_template(loaded.model.template).fitted(loaded.tokenizer).render_prompt(turns, loaded.tokenizer)
    slots = [IMAGE_TOKEN_ID] * loaded.model.image_tokens
    return [token for number in ids for token in (slots if number == IMAGE_TOKEN_ID else [number])]


def first_chances(loaded: LoadedModel, turns: list[Turn], image: Path | None) -> torch.Tensor:
    """Probabilities of the answer's first token."""
    model = loaded.model.eval()
    row = torch.tensor([row_of(loaded, turns)])
    pixels = None if image is None else ImageTransform.of(loaded.description.image)(Image.open(image))[None]
    with torch.no_grad():
        return model.llm(inputs_embeds=model.embed(row, pixels, None)[0]).logits[0, -1].softmax(-1)


def text_of(tokenizer: Any, number: int) -> str:
    """What llama.cpp shows of a token; decoding one token of SentencePiece alone loses the space in front."""
    token = tokenizer.convert_ids_to_tokens(number)
    if "▁" not in tokenizer.get_vocab():
        return str(tokenizer.decode([number]))
    return chr(int(token[3:5], 16)) if token.startswith("<0x") else token.replace("▁", " ")


def distance(loaded: LoadedModel, ours: torch.Tensor, theirs: list[list[Any]]) -> float:
    """Largest difference of log-probabilities over the tokens that can be told apart by their text."""
    texts = [text_of(loaded.tokenizer, number) for number in range(len(loaded.tokenizer))]
    known = {text: number for number, text in enumerate(texts) if texts.count(text) == 1 and "\ufffd" not in text}
    found = {known[text]: chance for text, chance in theirs if text in known}
    assert len(found) > len(texts) / 3
    return max(abs(float(ours[number].log()) - float(np.log(chance))) for number, chance in found.items())


def ask(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["node", str(SCRIPT)],
        input=json.dumps(jobs),
        env=environment() | node_with("llama-cpp"),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def job_of(loaded: LoadedModel, folder: Path, images: list[Path]) -> dict[str, Any]:
    template = get_template(loaded.model.template).fitted(loaded.tokenizer)
    questions = [f"{IMAGE_SLOT}\n{QUESTIONS[0]}", f"{IMAGE_SLOT}\n{QUESTIONS[1]}", QUESTIONS[2]]
    prompts = [template.text([Turn(question, None)]).replace(IMAGE_SLOT, MARKER) for question in questions]
    return {
        "model": str(folder / "model.gguf"),
        "mmproj": str(folder / "mmproj.gguf"),
        "prompts": [
            {"prompt": prompt, "images": [str(image)] * (MARKER in prompt)}
            for prompt, image in zip(prompts, images, strict=True)
        ],
        "tokens": TOKENS,
        "vocabulary": len(loaded.tokenizer),
        "texts": [template.text([Turn(text, None)]) for text in TEXTS],
        "chat": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": QUESTIONS[0]},
                    {"type": "image_url", "image_url": {"url": str(images[0])}},
                ],
            }
        ],
    }


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(len(QUESTIONS))]
    for path in paths:
        Image.fromarray(draw.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)).save(path)
    return paths


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory, images: list[Path]) -> dict[str, dict[str, Any]]:
    """Every model in llama.cpp, in fp32."""
    root = tmp_path_factory.mktemp("gguf")
    jobs = []
    for name, make in MODELS.items():
        loaded = make()
        write_model(loaded, root / name, "gguf", torch.float32)
        jobs.append(job_of(loaded, root / name, images))
    return dict(zip(MODELS, ask(jobs), strict=True))


@pytest.mark.parametrize("name", list(MODELS))
def test_llama_cpp_answers_as_our_engine_does(
    llama_cpp: dict[str, dict[str, Any]], images: list[Path], tmp_path: Path, name: str
) -> None:
    loaded, found = MODELS[name](), llama_cpp[name]
    save_model(loaded, tmp_path / "ours", None, {})
    model = tinylmm.load(tmp_path / "ours")
    seen = [images[0], images[1], None]
    far = []
    for number, image in enumerate(seen):
        turns = [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[number]}" if image else QUESTIONS[number], None)]
        far.append(distance(loaded, first_chances(loaded, turns, image), found["chances"][number]))
        assert found["lengths"][number] == len(row_of(loaded, turns))
    answers = [
        model.chat(question, image=image, max_new_tokens=TOKENS)
        for question, image in zip(QUESTIONS, seen, strict=True)
    ]
    assert [answer.strip() for answer in found["answers"]] == answers
    assert max(far) < TOLERANCE, far
    other = first_chances(loaded, [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)], images[1]).log()
    same = first_chances(loaded, [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)], images[0]).log()
    assert float((other - same).abs().max()) > 3 * TOLERANCE, "whether the image was seen does not show"


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory, images: list[Path]) -> dict[str, dict[str, Any]]:
    """Every tokenizer in llama.cpp."""
    root, jobs = tmp_path_factory.mktemp("vocabularies"), []
    for name in TOKENIZERS:
        loaded = with_tokenizer(name)
        write_model(loaded, root / name, "gguf", torch.float32)
        template = get_template(loaded.model.template).fitted(loaded.tokenizer)
        job = job_of(loaded, root / name, images)
        jobs.append(job | {"prompts": [], "texts": [*job["texts"], template.text(TALK)]})
    return dict(zip(TOKENIZERS, ask(jobs), strict=True))


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_llama_cpp_makes_the_same_tokens_and_the_same_prompt(
    vocabularies: dict[str, dict[str, Any]], name: str
) -> None:
    loaded = with_tokenizer(name)
    template = get_template(loaded.model.template).fitted(loaded.tokenizer)
    *single, talk = vocabularies[name]["ids"]
    for text, theirs in zip(TEXTS, single, strict=True):
        # the binding's tokenize() leaves the BOS to whoever answers
        bos, *ours = template.render_prompt([Turn(text, None)], loaded.tokenizer)
        assert (bos, theirs) == (loaded.tokenizer.bos_token_id, ours), text
    vocabulary = vocabulary_of(loaded.tokenizer)
    assert not isinstance(vocabulary, str)
    said = any("later questions begin with another token" in note for note in vocabulary.notes)
    assert (talk != template.render_prompt(TALK, loaded.tokenizer)[1:]) == said
    asked = template.text([Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)]).replace(IMAGE_SLOT, MARKER)
    assert vocabularies[name]["chat"] == asked


@pytest.mark.parametrize(("dtype", "far"), [("fp16", 5e-3), ("bf16", 5e-3), ("q8_0", 0.1)])
def test_narrow_files_are_as_near_as_their_weights(images: list[Path], tmp_path: Path, dtype: str, far: float) -> None:
    save_model(MODELS["qwen3"](), tmp_path / "ours", None, {})
    export_model(tmp_path / "ours", tmp_path / "gguf", "gguf", dtype)
    loaded = MODELS["qwen3"]()
    found = ask([job_of(loaded, tmp_path / "gguf", images)])[0]
    if dtype != "q8_0":  # what is measured is what llama.cpp makes of them, not what rounding them did
        for tensor in loaded.model.state_dict().values():
            tensor.copy_(tensor.to(DTYPES[dtype]))
    turns = [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)]
    measured = distance(loaded, first_chances(loaded, turns, images[0]), found["chances"][0])
    assert 0 < measured < far
