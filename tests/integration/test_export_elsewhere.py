"""Exported folders in other programs: each is run, asked, and held against our own engine's answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tinylmm
from tests.builders import tiny_loaded
from tests.elsewhere.environments import python_with
from tests.elsewhere.models import TANH, random_llm
from tests.integration.project import environment
from tests.unit.convert.test_hf import loaded_with
from tinylmm.convert.conversion import write_model
from tinylmm.models.checkpoint import LoadedModel, save_model

SCRIPT = Path(__file__).parents[1] / "elsewhere/ask_llava.py"
QUESTIONS = ["which colour?", "what?", "is there a digit in the picture, and what is it?", "which?"]
TOKENS = 6
ROTARY = {"rope_type": "default", "rope_theta": 50.0}
"""Not the default of either version, so that a folder which does not say it in the words of both answers otherwise."""


def llm(kind: str, **more: Any) -> nn.Module:
    made = random_llm(kind, **more)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            # at their own scale random weights answer alike whatever they see
            parameter.mul_(3 if parameter.dim() > 1 else 1)
            if name == "lm_head.bias":
                parameter.normal_()
    return made


MODELS: dict[str, Callable[[], LoadedModel]] = {
    "llama-siglip": tiny_loaded,
    "qwen2-clip": lambda: loaded_with(llm("Qwen2"), "clip", "center_crop", select_layer=1),
    "tied-qwen2-siglip-pad": lambda: loaded_with(
        llm("Qwen2", tie_word_embeddings=True), mode="pad", drop_first_token=True
    ),
    "qwen3-siglip": lambda: loaded_with(llm("Qwen3", rope_parameters=ROTARY)),
    "gemma-siglip": lambda: loaded_with(llm("Gemma", hidden_act=TANH, hidden_activation=TANH)),
    "stablelm-clip": lambda: loaded_with(llm("StableLm"), "clip", "center_crop", select_layer=1),
    "phi2-siglip": lambda: loaded_with(llm("Phi", num_key_value_heads=4)),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model saved as ours and exported, pictures and questions, and what our own engine answers."""
    root = tmp_path_factory.mktemp("elsewhere")
    draw = np.random.default_rng(0)
    images = []
    for number in range(len(QUESTIONS)):
        pixels = draw.integers(0, 256, (20 + 3 * number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
        images.append(str(root / f"{number}.png"))
    expected = {}
    for name, make in MODELS.items():
        loaded = make()
        save_model(loaded, root / name / "ours", None, {})
        write_model(loaded, root / name / "hf", "hf", torch.float32)
        model = tinylmm.load(root / name / "ours")
        system = [{"role": "system", "content": "Be brief."}]
        expected[str(root / name / "hf")] = {
            "single": [
                model.chat(question, image=image, max_new_tokens=TOKENS)
                for question, image in zip(QUESTIONS, images, strict=True)
            ],
            "several": model.chat(f"<image><image>{QUESTIONS[0]}", image=images[:2], max_new_tokens=TOKENS),
            "system": model.chat(QUESTIONS[0], image=images[0], history=system, max_new_tokens=TOKENS),
        }
    return {"images": images, "expected": expected}


@pytest.mark.parametrize("version", ["4", "5"])
def test_transformers_alone_answers_as_our_engine_does(asked: dict[str, Any], version: str) -> None:
    python = sys.executable if version == "5" else python_with("transformers-4")
    expected = {folder: ours for folder, ours in asked["expected"].items() if version == "5" or "gemma" not in folder}
    job = {"folders": list(expected), "images": asked["images"], "questions": QUESTIONS, "tokens": TOKENS}
    done = subprocess.run(
        [python, str(SCRIPT)], input=json.dumps(job), env=environment(), capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["version"].startswith(f"{version}.")
    assert len({text for answers in expected.values() for text in answers["single"]}) > len(expected), (
        "too alike to tell"
    )
    for folder, ours in expected.items():
        theirs = found["folders"][folder]
        assert theirs["lost"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}, folder
        for way in ("single", "batch", "pipeline"):
            assert theirs[way] == ours["single"], (folder, way)
        assert theirs["system_text"].startswith("Be brief. USER: "), folder
        assert (theirs["several"], theirs["system"]) == (ours["several"], ours["system"]), folder


def test_an_export_says_where_its_answers_are_others(asked: dict[str, Any], tmp_path: Path) -> None:
    for name, make in MODELS.items():
        notes = write_model(make(), tmp_path / name, "hf", torch.float32).notes
        assert any("answers are this model's under transformers 5" in note for note in notes) == ("gemma" in name)


def test_a_folder_says_nothing_of_the_machine_that_wrote_it(asked: dict[str, Any]) -> None:
    for folder in map(Path, asked["expected"]):
        for path in folder.glob("*.json"):
            text = path.read_text()
            assert str(folder.parent) not in text and "local_files_only" not in text, path
        assert json.loads((folder / "config.json").read_text())["text_config"][
            "architectures"
        ]  # what vLLM dispatches on
