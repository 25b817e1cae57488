"""Exported GGUF files in llama.cpp: loaded, asked, and held against our own engine's tokens, answers and probabilities."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tinylmm
from tests.elsewhere.environments import node_with
from tests.elsewhere.gguf_models import MODELS, with_tokenizer
from tests.elsewhere.ours import first_chances, noise, row_of
from tests.integration.project import environment
from tests.unit.convert.tokenizers import TOKENIZERS
from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.ask_elsewhere import text_of
from tinylmm.convert.certificate import CERTIFICATE
from tinylmm.convert.conversion import Check, export_model, write_model
from tinylmm.convert.gguf_vocab import vocabulary_of
from tinylmm.data.chat import Turn, get_template
from tinylmm.models.checkpoint import LoadedModel, save_model
from tinylmm.models.devices import DTYPES

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
        "context": 512,
        "tokens": TOKENS,
        "looked_at": len(loaded.tokenizer),
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
    return noise(tmp_path_factory.mktemp("images"), len(QUESTIONS))


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
        far.append(distance(loaded, first_chances(loaded, turns, image), found["answers"][number]["chances"]))
        assert found["answers"][number]["length"] == len(row_of(loaded, turns))
    answers = [
        model.chat(question, image=image, max_new_tokens=TOKENS)
        for question, image in zip(QUESTIONS, seen, strict=True)
    ]
    assert [answer["text"].strip() for answer in found["answers"]] == answers
    assert max(far) < TOLERANCE, far
    other = first_chances(loaded, [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)], images[1]).log()
    same = first_chances(loaded, [Turn(f"{IMAGE_SLOT}\n{QUESTIONS[0]}", None)], images[0]).log()
    assert float((other - same).abs().max()) > 3 * TOLERANCE, "whether the image was seen does not show"


def test_a_hundred_pictures_get_the_same_answers_and_a_certificate_says_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_PATH", node_with("llama-cpp")["NODE_PATH"])
    save_model(MODELS["nano-tokenizer"](), tmp_path / "ours", None, {})
    found = export_model(tmp_path / "ours", tmp_path / "gguf", "gguf", check=Check(100)).certificate
    assert found is not None and found.pictures == 100 and found.distinct_answers > 25
    assert found.equal_answers == found.equal_prompts == found.positions == found.questions == 102
    kept = json.loads((tmp_path / "gguf" / CERTIFICATE).read_text())
    assert 0 < kept["largest_difference"] == found.largest_difference < TOLERANCE
    assert kept["sentence"] in (tmp_path / "gguf/README.md").read_text()


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
    measured = distance(loaded, first_chances(loaded, turns, images[0]), found["answers"][0]["chances"])
    assert 0 < measured < far
