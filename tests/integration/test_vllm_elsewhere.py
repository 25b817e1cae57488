"""Exported folders in vLLM on a CPU: answers to 50 pictures, single and batched, and their probabilities, held against ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tinylmm
from tests.elsewhere.adapters import adapted
from tests.elsewhere.environments import vllm_python
from tests.elsewhere.models import MODELS
from tests.elsewhere.ours import first_chances
from tests.integration.project import environment
from tinylmm.constants import IMAGE_SLOT
from tinylmm.convert.conversion import export_model, write_model
from tinylmm.data.chat import Turn
from tinylmm.models.checkpoint import save_model

SCRIPT = Path(__file__).parents[1] / "elsewhere/ask_vllm.py"
PICTURES, TOKENS = 50, 6
QUESTIONS = ["which colour?", "what?", "is there a digit in the picture, and what is it?", "which?"]
PHI = "phi2-siglip"
ADAPTED, ADAPTER = "llama-siglip", "adapter"
"""What an adapter is put on, and what that makes."""
TOLERANCE = 1e-4
"""Of the log-probability of an answer's first token."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model exported; pictures of many shapes; what vLLM says."""
    root, draw = tmp_path_factory.mktemp("vllm"), np.random.default_rng(0)
    images = []
    for number in range(PICTURES):
        pixels = draw.integers(0, 256, (20 + 3 * (number % 9), 30 - 2 * (number % 5), 3), dtype=np.uint8)
        images.append(root / f"{number}.png")
        Image.fromarray(pixels).save(images[-1])
    for name, make in MODELS.items():
        loaded = make()
        save_model(loaded, root / name / "ours", None, {})
        write_model(loaded, root / name / "hf", "hf", torch.float32)
    adapted(root / ADAPTED / "ours", root / ADAPTER / "ours", "lora", far=0.1)
    export_model(root / ADAPTER / "ours", root / ADAPTER / "hf", "adapter")
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(PICTURES)]
    job = {
        "folders": {str(root / name / "hf"): "auto" for name in MODELS},
        "adapters": {str(root / ADAPTER / "hf"): str(root / ADAPTER / "hf/base")},
        "images": [str(image) for image in images],
        "questions": questions,
        "tokens": TOKENS,
    }
    done = subprocess.run(
        [vllm_python(), str(SCRIPT)],
        input=json.dumps(job),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])["folders"]
    return {"root": root, "images": images, "questions": questions, "found": found}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(name for name in MODELS if name != PHI), ADAPTER])
def test_vllm_answers_as_our_engine_does(asked: dict[str, Any], name: str) -> None:
    theirs = asked["found"][str(asked["root"] / name / "hf")]
    assert theirs.get("class") == "LlavaForConditionalGeneration", theirs
    model = tinylmm.load(asked["root"] / name / "ours")
    loaded = model.loaded
    images, questions = asked["images"], asked["questions"]

    def text(answer: dict[str, Any]) -> str:
        return str(loaded.tokenizer.decode(answer["ids"], skip_special_tokens=True)).strip()

    ours = [
        model.chat(question, image=image, max_new_tokens=TOKENS)
        for question, image in zip(questions, images, strict=True)
    ]
    assert len(set(ours)) > len(QUESTIONS), "too alike to tell"
    assert [text(answer) for answer in theirs["single"]] == ours
    assert [text(answer) for answer in theirs["batch"]] == ours
    several = model.chat(f"{IMAGE_SLOT}{IMAGE_SLOT}{questions[0]}", image=images[:2], max_new_tokens=TOKENS)
    assert text(theirs["several"]) == several
    system = [{"role": "system", "content": "Be brief."}]
    assert text(theirs["system"]) == model.chat(questions[0], image=images[0], history=system, max_new_tokens=TOKENS)
    for number in range(0, PICTURES, 10):
        turns = [Turn(f"{IMAGE_SLOT}\n{questions[number]}", None)]
        answer = theirs["single"][number]
        chance = first_chances(loaded, turns, images[number]).log()[answer["ids"][0]]
        assert abs(float(chance) - answer["log_probs"][0]) < TOLERANCE


@pytest.mark.slow
def test_the_adapter_changes_what_vllm_says(asked: dict[str, Any]) -> None:
    with_it, without = (asked["found"][str(asked["root"] / name / "hf")]["single"] for name in (ADAPTER, ADAPTED))
    assert sum(one["ids"] != other["ids"] for one, other in zip(with_it, without, strict=True)) > PICTURES / 2


@pytest.mark.slow
def test_vllm_reads_a_phi_and_cannot_run_it(asked: dict[str, Any]) -> None:
    """Its Llava runs the LLM's decoder without the batch dimension that its backend for Phi adds; docs say so."""
    theirs = asked["found"][str(asked["root"] / PHI / "hf")]
    assert "must match the size of tensor" in theirs.get("refused", ""), "it can now: say so in docs/checkpoints.md"
