"""The embedded default at toy size, through the command: stages, scores, report, reuse, sweep."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

import tinylmm
from tests.integration.project import Project
from tinylmm.demo.questions import Question, question_sets
from tinylmm.demo.talk import Talk, Turn
from tinylmm.evaluation.images import open_image_ref
from tinylmm.generation.choose import Sampling
from tinylmm.serving.options import ServeOptions
from tinylmm.serving.service import Service
from tinylmm.store.find_model import find_model
from tinylmm.store.runs import read_runs

SMALL = [
    f"{where}.options.{name}={count}"
    for where in ("data.build", "llm.build.data.build", "vision_tower.build.data.build", "eval.digits.data.build")
    for name, count in {"pretrain": 96, "share": 32, "finetune": 48, "text": 200, "test": 8}.items()
]
WORDS = (
    *SMALL,
    "llm.build.steps=4",
    "vision_tower.build.steps=4",
    "vision_tower.build.batch=16",
    "tracking.log_steps=1",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("embedded"), WORDS)
    done = project.train()
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout and "report.html" in done.stdout
    return project


def statuses(project: Project) -> dict[str, str]:
    """Stage name -> status in the newest run."""
    newest = max(project.store.glob("runs/*/run.json"), key=lambda path: path.stat().st_mtime_ns)
    record = json.loads(newest.read_text())
    assert record["status"] == "done"
    return {stage["name"]: stage["status"] for stage in record["stages"]}


def test_results_are_tidy_rows_for_every_stage_and_question_type(finished: Project) -> None:
    (path,) = finished.store.glob("reports/*/results.json")
    rows = json.loads(path.read_text())["rows"]
    assert {row["stage"] for row in rows} == {"pretrain", "finetune"}
    assert {row["metric"] for row in rows} >= {"accuracy", "accuracy/digit", "accuracy/colour", "accuracy/yesno"}
    columns = {"run", "stage", "evaluation", "benchmark", "metric", "value", "blind", "chance", "count", "interval"}
    columns |= {"limited", "protocol"}
    assert all(set(row) == columns and row["interval"][0] <= row["value"] <= row["interval"][1] for row in rows)


def test_the_page_is_self_contained_and_leads_back_to_everything(finished: Project) -> None:
    (page,) = finished.store.glob("reports/*/report.html")
    text = page.read_text()
    assert "<svg" in text and "data:image/png;base64," in text
    assert 'src="http' not in text and "<script" not in text
    assert all(stage.name in text for stage in finished.stages("train"))


def test_the_same_command_reuses_everything(finished: Project) -> None:
    assert finished.train().returncode == 0
    assert set(statuses(finished).values()) == {"reused"}


def test_share_reuses_the_parts_and_bases_pretraining(finished: Project) -> None:
    done = finished.train("recipe=share")
    assert done.returncode == 0, done.stderr
    ran = {name for name, status in statuses(finished).items() if status == "run"}
    trained = {"share_pretrain", "finetune"}
    read = {"images[share_pretrain]", "prepare[share_pretrain]"}
    assert ran == trained | read | {f"digits@{name}" for name in trained}


def test_a_sweep_shares_stages_between_its_runs(finished: Project) -> None:
    done = finished.train("-m", "seed=0,5", "recipe=base")
    assert done.returncode == 0, done.stderr
    assert statuses(finished)["pretrain"] == "run" and statuses(finished)["prepare[finetune]"] == "reused"
    assert "seed=5" in done.stdout


def test_the_model_folder_is_self_contained(finished: Project) -> None:
    model = finished.stages("train")[0] / "output/model"
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert names >= {"config.json", "llm/model.safetensors", "vision_tower/config.json", "connector/model.safetensors"}
    description = json.loads((model / "config.json").read_text())
    assert description["template"] == "llama" and description["image"]["size"] == 32
    assert str(Path.cwd()) not in (model / "config.json").read_text()


@pytest.mark.slow  # CI gives them on the quickstart itself (.ci/run)
def test_the_serving_pages_commands_lead_from_the_run_to_every_way_of_asking_it(finished: Project) -> None:
    pytest.importorskip("gradio", reason="the page shows the demo")
    from tests.serving_page import follow

    said = follow(finished.root, finished.words)
    beginnings = ("tinylmm-train name=first", "tinylmm chat", "tinylmm demo", "tinylmm serve", "tinylmm export", "curl")
    assert all(any(command.startswith(words) for command in said) for words in beginnings)
    assert "first" in said["tinylmm runs"]
    assert "image_tokens=" in said["ask.py"]
    assert all("image tokens" in line for command, line in said.items() if command.startswith("tinylmm demo"))
    [curled] = [text for command, text in said.items() if command.startswith("curl")]
    assert curled.rstrip().endswith("data: [DONE]")
    assert {path.name for path in (finished.root / "first-gguf").iterdir()} >= {
        "model.gguf",
        "mmproj.gguf",
        "Modelfile",
    }


def test_the_demo_answers_held_out_questions_as_the_evaluation_did(finished: Project, tmp_path: Path) -> None:
    first = min(read_runs(finished.store), key=lambda run: run.created)
    models = [find_model(f"{first.name}@{name}", finished.store) for name in ("finetune", "pretrain")]
    [found] = question_sets(models, 6)
    assert found.name == "digits" and len(found.questions) == 6
    services = [Service(tinylmm.load(model, device="cpu"), model.parents[1].name, ServeOptions()) for model in models]
    for service in services:
        service.start()

    async def asked(question: Question) -> Turn:
        talk = Talk()
        open_image_ref(question.images[0]).save(tmp_path / "asked.png")
        async for _ in talk.ask(services, question.text, [tmp_path / "asked.png"], Sampling(max_new_tokens=8)):
            pass
        return talk.turns[0]

    try:
        for question in found.questions:
            replies = asyncio.run(asked(question)).replies
            assert tuple(reply.text.strip() for reply in replies) == question.said
    finally:
        for service in services:
            service.close()
