"""Certificates of other programs that are really asked: transformers, peft and llama.cpp, about whole and spoilt folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.builders import tiny_loaded
from tests.elsewhere.adapters import adapted
from tests.elsewhere.environments import node_with, python_with
from tests.integration.project import Project, environment
from tests.integration.test_embedded import WORDS
from tests.unit.convert.test_certificate import corrupt, spoilt
from tests.unit.serving.process import serving, user, wide_model
from tinylmm.cli.main import app
from tinylmm.convert import ask_elsewhere
from tinylmm.convert.ask_ours import ask_ours
from tinylmm.convert.asking import Asking, Question
from tinylmm.convert.certificate import CERTIFICATE, OtherAnswersError
from tinylmm.convert.conversion import Check, ExportReport, export_model, import_model
from tinylmm.generation.session import load
from tinylmm.models.checkpoint import load_model, save_model


def tuned(root: Path, name: str) -> Path:
    """A model with adapters on a base beside it."""
    if not (root / "base").exists():
        wide_model(root / "wide")
        loaded = load_model(root / "wide", [])
        head = loaded.model.llm.get_output_embeddings().weight
        with torch.no_grad():  # special tokens within an answer are shown in other ways by other programs
            head[loaded.tokenizer.all_special_ids] = 0
            head[len(loaded.tokenizer) :] = (
                0  # rows that are no token: one becomes the image token, which nobody may say
            )
        save_model(loaded, root / "base", None, {})
    return adapted(root / "base", root / name, name)


def said(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CERTIFICATE).read_text())
    return found


def equal(report: ExportReport, questions: int) -> None:
    found = report.certificate
    assert found is not None and found.passed
    assert found.equal_prompts == found.questions == questions
    assert found.equal_answers == questions - found.near_ties and found.near_ties < 2
    assert found.distinct_answers > 2, "too alike to tell"


@pytest.fixture(scope="module")
def llama_cpp() -> dict[str, str]:
    return node_with("llama-cpp")


def test_transformers_itself_is_asked_and_a_corrupted_tensor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide_model(tmp_path / "ours")
    report = export_model(tmp_path / "ours", tmp_path / "hf", "hf", "bf16", check=Check(4))
    equal(report, 6)
    found = said(tmp_path / "hf")
    assert found["program"] == "transformers" and found["versions"]["transformers"] and found["dtype"] == "bf16"
    assert "vLLM was not run." in found["not_checked"] and 0 <= found["largest_difference"] < 1e-3
    assert "vllm serve ./hf" in ModelCard.load(tmp_path / "hf/README.md").text

    def spoil(folder: Path) -> None:
        corrupt(folder / "model.safetensors")

    spoilt(monkeypatch, "hf", spoil)
    with pytest.raises(OtherAnswersError, match=r"transformers .* gives 0 of"):
        export_model(tmp_path / "ours", tmp_path / "spoilt", "hf", check=Check(2))
    assert not (tmp_path / "spoilt").exists() and said(tmp_path / "spoilt.failed")["passed"] is False


@pytest.mark.slow
def test_a_tensor_that_is_not_there_is_an_answer_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide_model(tmp_path / "ours")

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["renamed"] = tensors.pop(sorted(tensors)[-1])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    spoilt(monkeypatch, "hf", spoil)
    with pytest.raises(OtherAnswersError, match=r"does not find all tensors of the folder, or finds others: .*renamed"):
        export_model(tmp_path / "ours", tmp_path / "hf", "hf", check=Check(2))
    assert "renamed" in said(tmp_path / "hf.failed")["error"]


def test_llama_cpp_itself_is_asked_and_a_corrupted_tensor_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp: dict[str, str]
) -> None:
    monkeypatch.setenv("NODE_PATH", llama_cpp["NODE_PATH"])
    wide_model(tmp_path / "ours")
    equal(export_model(tmp_path / "ours", tmp_path / "gguf", "gguf", check=Check(3)), 5)
    found = said(tmp_path / "gguf")
    assert found["versions"]["llama.cpp"].startswith("b") and any(
        "Ollama was not run" in one for one in found["not_checked"]
    )
    assert set(found["files"]) == {"model.gguf", "mmproj.gguf", "Modelfile"}

    def spoil(folder: Path) -> None:
        content = bytearray((folder / "model.gguf").read_bytes())
        content[-4000:] = bytes(4000)
        (folder / "model.gguf").write_bytes(content)

    spoilt(monkeypatch, "gguf", spoil)
    with pytest.raises(OtherAnswersError, match=r"llama.cpp b\d+ gives"):
        export_model(tmp_path / "ours", tmp_path / "spoilt", "gguf", check=Check(2))
    assert said(tmp_path / "spoilt.failed")["passed"] is False


@pytest.mark.parametrize(
    "name", ["lora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("every-part", "qlora"))]
)
def test_peft_puts_the_adapter_on_the_exported_base_and_answers_as_our_merged_model(tmp_path: Path, name: str) -> None:
    model = tuned(tmp_path, name)
    equal(export_model(model, tmp_path / "out", "adapter", check=Check(4)), 6)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert config["base_model_name_or_path"] == "base" and str(tmp_path) not in json.dumps(config)
    assert all(key.startswith("base_model.model.model.") for key in tensors)
    assert "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.weight" in tensors
    assert said(tmp_path / "out")["versions"]["peft"]
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == "peft" and "--enable-lora" in card.text
    base = load_model(tmp_path / "base", [])
    own = ask_ours(base, [Question("hi")], 8)
    import_model(tmp_path / "out", tmp_path / "again", llm=tmp_path / "out/base")
    merged, again = (ask_ours(load_model(path, []), [Question("hi")], 8) for path in (model, tmp_path / "again"))
    assert merged[0].ids == again[0].ids != own[0].ids, "the adapter changes what is said, and comes back whole"


@pytest.mark.slow
def test_a_lora_stage_is_exported_merged_in_every_form_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp: dict[str, str]
) -> None:
    monkeypatch.setenv("NODE_PATH", llama_cpp["NODE_PATH"])
    model = tuned(tmp_path, "lora")
    for format_ in ("hf", "gguf"):
        equal(export_model(model, tmp_path / format_, format_, check=Check(4)), 6)
    names = {"llm": "ours/llm", "tower": "ours/tower"}
    equal(export_model(model, tmp_path / "factory", "factory", **names, check=Check(4)), 6)
    asked = load(model).chat("hi", max_new_tokens=8)
    with serving(model, "--name", "lora") as server:
        found = server.openai.chat.completions.create(model="lora", messages=[user("hi")], max_tokens=8)
    assert found.choices[0].message.content == asked


@pytest.mark.slow
def test_transformers_4_and_its_peft_read_the_adapter_too(tmp_path: Path) -> None:
    python = python_with("transformers-4")
    model = tuned(tmp_path, "lora")
    export_model(model, tmp_path / "out", "adapter")
    loaded, question = load_model(model, []), Question("which colour?")
    expected = ask_ours(loaded, [question], 8)
    asking = Asking(tmp_path / "out", loaded, [question], expected, 8, 320)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask_elsewhere.sys, "executable", python)
        heard = ask_elsewhere.ask_peft(asking, "base")
    assert heard.versions["transformers"].startswith("4.") and heard.answers[0].ids == expected[0].ids


def test_the_command_ends_with_one_line_of_what_was_found_and_exit_code_1_where_it_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_loaded(), tmp_path / "ours", None, {})
    words = ["--to", "factory", "--llm", "ours/llm", "--tower", "ours/tower", "--verify", "--questions", "2"]
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), str(tmp_path / "out"), *words])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("verified: ")]
    assert "gives 4 of 4 equal answers" in line and said(tmp_path / "out")["sentence"] in line
    spoilt(monkeypatch, "factory", lambda folder: corrupt(folder / "model.safetensors"))
    done = CliRunner().invoke(app, ["export", str(tmp_path / "ours"), str(tmp_path / "spoilt"), *words])
    assert isinstance(done.exception, OtherAnswersError) and done.exception.exit_code == 1


@pytest.mark.slow
def test_a_finished_run_is_exported_with_its_own_questions_results_and_recipe(
    tmp_path: Path, llama_cpp: dict[str, str]
) -> None:
    project = Project(tmp_path, WORDS)
    short = [f"recipe.stages.{stage}.max_steps=4" for stage in ("pretrain", "finetune")]
    done = project.train("name=cell", "recipe=lora", *short)
    assert done.returncode == 0, done.stderr
    (stage,) = [one for one in project.stages("train") if "finetune" in (one / "manifest.json").read_text()]
    words = ["--verify", "--questions", "8", "--license", "apache-2.0"]
    for where, format_ in (("cell", "hf"), ("cell", "adapter"), (str(stage), "gguf")):
        done = subprocess.run(
            [sys.executable, "-m", "tinylmm.cli.main", "export", where, format_, "--to", format_, *words],
            cwd=tmp_path,
            env=environment() | llama_cpp,
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, done.stderr
        assert "gives 10 of 10 equal answers" in done.stdout.replace("\n", " ")
        found, card = said(tmp_path / format_), ModelCard.load(tmp_path / format_ / "README.md")
        assert found["asked"].startswith("questions of the run's own evaluation: digits")
        assert found["model"]["run"] == "cell" and found["model"]["stage"] == "finetune"
        assert stage.name.partition("-")[2] == found["model"]["digest"][:16]
        assert card.data.license == "apache-2.0" and card.data.eval_results[0].metric_type == "accuracy"
        assert "| accuracy |" in card.text and "LLM (lora, rank " in card.text and "from nothing" in card.text
        assert str(tmp_path) not in (tmp_path / format_ / "README.md").read_text(), "a card is public"
