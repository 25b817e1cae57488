"""Exported GGUF files in llama.cpp's own server: asked over HTTP as OpenAI's clients do, with the files' chat template."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import tinylmm
from tests.elsewhere.environments import node_with, python_with
from tests.elsewhere.gguf_models import MODELS
from tests.elsewhere.ours import first_chances, noise, row_of
from tests.integration.project import environment
from tests.integration.test_gguf_elsewhere import MARKER, QUESTIONS, TOKENS, TOLERANCE
from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.conversion import write_model
from tinylmm.data.chat import Turn, get_template
from tinylmm.models.checkpoint import LoadedModel, save_model

PICTURES = 100
BROKEN = "\ufffd"
"""A part of a character; the server holds back those that an answer ends with."""
SCRIPT = Path(__file__).parents[1] / "elsewhere/ask_llama_server.py"


def asked(loaded: LoadedModel, image: Path | None, question: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A question as a talk, and as the whole prompt."""
    turns = [Turn(f"{IMAGE_SLOT}\n{question}" if image else question, None)]
    prompt = get_template(loaded.model.template).fitted(loaded.tokenizer).text(turns).replace(IMAGE_SLOT, MARKER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    pictures = [] if image is None else [base64.b64encode(image.read_bytes()).decode()]
    for picture in pictures:
        parts.insert(0, {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}})
    talk = {"messages": [{"role": "user", "content": parts}], "tokens": TOKENS}
    return talk, {"prompt": prompt, "images": pictures}


def about(name: str, images: list[Path]) -> list[tuple[Path | None, str]]:
    """Pictures, or none, and what is asked about each."""
    shown = images if name == "nano-tokenizer" else images[:2]
    return [*zip(shown, cycle(QUESTIONS)), (None, QUESTIONS[2])]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return noise(tmp_path_factory.mktemp("images"), PICTURES)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, images: list[Path]) -> dict[str, dict[str, Any]]:
    """Every model in a server of its own, in fp32; one of them is asked about all pictures."""
    root, jobs = tmp_path_factory.mktemp("gguf"), []
    for name, make in MODELS.items():
        loaded = make()
        write_model(loaded, root / name, "gguf", torch.float32)
        files = {"model": str(root / name / "model.gguf"), "mmproj": str(root / name / "mmproj.gguf")}
        pairs = [asked(loaded, image, question) for image, question in about(name, images)]
        talks, prompts = [talk for talk, _ in pairs], [prompt for _, prompt in pairs]
        jobs.append(files | {"talks": talks, "prompts": prompts, "vocabulary": len(loaded.tokenizer)})
    done = subprocess.run(
        [python_with("llama-server"), str(SCRIPT)],
        input=json.dumps(jobs),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(MODELS, json.loads(done.stdout.splitlines()[-1])["models"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MODELS))
def test_llama_cpps_server_answers_as_our_engine_does(
    served: dict[str, dict[str, Any]], images: list[Path], tmp_path: Path, name: str
) -> None:
    loaded, found = MODELS[name](), served[name]
    save_model(loaded, tmp_path / "ours", None, {})
    model = tinylmm.load(tmp_path / "ours")
    compared = 0
    for number, (image, question) in enumerate(about(name, images)):
        chat, first = found["chat"][number], found["first"][number]
        turns = [Turn(f"{IMAGE_SLOT}\n{question}" if image else question, None)]
        length = len(row_of(loaded, turns))
        assert (chat["usage"]["prompt_tokens"], first["length"]) == (length, length)
        said = chat["choices"][0]["message"]["content"].strip()
        expected = model.chat(question, image=image, max_new_tokens=TOKENS)
        assert said.rstrip(BROKEN) == expected.rstrip(BROKEN)
        if not first["log_probs"]:
            continue
        ours = first_chances(loaded, turns, image).log()
        theirs = {int(token): chance for token, chance in first["log_probs"].items()}
        assert len(theirs) >= len(loaded.tokenizer) - 4  # it lists as many as there are texts
        assert max(abs(float(ours[token]) - chance) for token, chance in theirs.items()) < TOLERANCE
        compared += 1
    assert compared, "the answers are parts of characters: draw another model"


@pytest.mark.slow
@pytest.mark.parametrize("language", ["python", "js"])
def test_what_the_model_card_says_to_do_gives_our_answer(tmp_path: Path, images: list[Path], language: str) -> None:
    loaded = MODELS["nano-tokenizer"]()
    save_model(loaded, tmp_path / "ours", None, {})
    write_model(loaded, tmp_path / "out", "gguf", torch.float32)
    shutil.copy(images[0], tmp_path / "cat.png")
    [code] = re.findall(rf"^```{language}\n(.*?)^```", (tmp_path / "out/README.md").read_text(), re.M | re.S)
    (tmp_path / f"ask.{language}").write_text(code)
    program = ["node"] if language == "js" else [python_with("llama-server")]
    more = node_with("llama-cpp") if language == "js" else {}
    done = subprocess.run(
        [*program, f"ask.{language}"],
        cwd=tmp_path,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = tinylmm.load(tmp_path / "ours").chat("What is it?", image=tmp_path / "cat.png", max_new_tokens=64)
    assert len(set(answer)) > 5 and answer.rstrip(BROKEN) in done.stdout
