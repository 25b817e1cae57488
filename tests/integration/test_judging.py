"""Judged and unjudged benchmarks in one run: what can be done is done, what waits is said, nothing is asked twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.project import COLOURS, Project, tiny_project, write_images
from tests.unit.evaluation.benchmarks.disk import write_json, write_jsonl
from tests.unit.evaluation.judge_server import Response, completion, judge_server
from tinylmm.evaluation.judge import Judge

SECRET = "sk-proj-aB3dEf6hIj9kLmN0pQrS"
WORDS = ("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1", "name=judged")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A tiny project with MM-Vet, which needs a judge, in front of a benchmark that needs none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tiny_project(tmp_path)
    names = write_images(tmp_path / "vet/images")
    rows = [{"question_id": n, "image": name, "text": "Which colour?"} for n, name in enumerate(names[:3])]
    write_jsonl(tmp_path / "vet/llava-mm-vet.jsonl", rows)
    grading = {"imagesource": "web", "capability": ["rec"], "question": "Which colour?"}
    answers = {
        f"v1_{n}": {**grading, "imagename": name, "answer": name.split("-")[1][:-4]} for n, name in enumerate(names[:3])
    }
    write_json(tmp_path / "vet/mm-vet.json", answers)
    write_images(tmp_path / "shapes/images")
    asked = [
        {
            "question_id": n,
            "image": name,
            "text": "Which colour?",
            "category": "colour",
            "answer": "red",
            "options": len(COLOURS),
        }
        for n, name in enumerate(names)
    ]
    write_jsonl(tmp_path / "shapes/test.jsonl", asked)
    evals = [
        "eval=[mmvet,gqa]",
        f"eval.mmvet.root={tmp_path / 'vet'}",
        "eval.mmvet.max_new_tokens=3",
        "eval.gqa.benchmark=digits",
        f"eval.gqa.root={tmp_path / 'shapes'}",
        "eval.gqa.max_new_tokens=3",
    ]
    words = [word for word in made.words if word != "eval=none"]
    return Project(made.root, (*words, *evals, *WORDS))


def named(url: str, model: str = "judge-1") -> str:
    return f"eval.mmvet.judge={{base_url: {url}, model: {model}}}"


def rows_of(run: Path) -> dict[tuple[str, str], str]:
    record = json.loads((run / "run.json").read_text())
    return {(row["kind"], row["name"]): row["status"] for row in record["stages"]}


def scores(project: Project, run: str) -> dict[str, Any]:
    record = json.loads((project.store / f"reports/{run}/results.json").read_text())
    return {row["metric"]: row["value"] for row in record["rows"]}


def test_a_judged_and_an_unjudged_benchmark_in_one_run_end_with_both_handled(project: Project) -> None:
    first = project.train_here()
    assert first.returncode == 2, first.stderr
    assert "mmvet is scored by a judge, and none is named. Set eval.mmvet.judge.base_url" in first.stderr
    run = project.store / "runs/judged"
    assert json.loads((run / "run.json").read_text())["status"] == "waiting"
    status = rows_of(run)
    assert status["eval", "mmvet@finetune"] == status["eval", "gqa@finetune"] == "run"
    assert status["judge", "mmvet@finetune"] == "todo"
    assert "report" in first.stdout and set(scores(project, "judged")) == {"accuracy", "accuracy/colour"}
    with judge_server(lambda body: completion("0.5")) as server:
        second = project.train_here(named(server.url))
        assert second.returncode == 0, second.stderr
        asked = len(server.requests)
        other = project.train_here(named(server.url, "judge-2"))
        assert other.returncode == 0 and len(server.requests) == 2 * asked == 6
    for number in (2, 3):
        status = rows_of(project.store / f"runs/judged-{number}")
        assert status.pop(("judge", "mmvet@finetune")) == "run"
        assert set(status.values()) == {"reused"}  # the model is asked nothing again
        found = scores(project, f"judged-{number}")
        assert found["total"] == 50.0 and "accuracy" in found
    assert project.train_here(named("http://localhost:1/v1")).returncode == 0  # another address, the same judge: reused


@pytest.mark.parametrize("fault", ["judge", "images"])
def test_an_evaluation_that_fails_stops_none_that_does_not_need_it(fault: str, project: Project) -> None:
    with judge_server(lambda body: (404, {}, b"no such model")) as server:
        if fault == "images":
            (project.root / "vet/images/0-red.png").write_bytes(b"no image")
        done = project.train_here(named(server.url))
    assert done.returncode == 2, done.stderr
    status = rows_of(project.store / "runs/judged")
    failed = ("judge" if fault == "judge" else "eval", "mmvet@finetune")
    assert status[failed] == "failed" and status["eval", "gqa@finetune"] == "run"
    assert status["judge", "mmvet@finetune"] == ("failed" if fault == "judge" else "todo")
    assert "accuracy" in scores(project, "judged")


def test_a_judges_address_that_is_none_is_refused_before_anything_starts(project: Project) -> None:
    done = project.train_here(named("ftp://localhost/v1"))
    assert done.returncode == 2 and "eval.mmvet.judge.base_url: " in done.stderr
    assert not (project.store / "runs").exists()


FAULTS: dict[str, Callable[[dict[str, Any]], Response]] = {
    "a refusal that echoes it": lambda body: (401, {}, f"Incorrect key: {SECRET}".encode()),
    "an echo in quotes": lambda body: (
        400,
        {},
        json.dumps({"error": {"Authorization": f"Bearer {SECRET}\n"}}).encode(),
    ),
    "an echo in its reason": lambda body: (418, {"X-Key": SECRET}, SECRET.encode().hex().encode()),
    "no completion": lambda body: (200, {}, f"<html>{SECRET}</html>".encode()),
    "a reply that holds it": lambda body: completion(f"0.5 {SECRET}"),
}


def test_no_secret_of_the_environment_is_left_in_the_store_whatever_fails(
    project: Project, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    others = {name: f"{name.lower()}-{SECRET[::-1]}" for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")}
    for name, value in others.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(Judge.__init__.__kwdefaults__, "backoff", 0.0)
    said = ""
    for fault in ("a broken image", "a key that is none", *FAULTS):
        key = f"{SECRET}\n{SECRET}" if fault == "a key that is none" else f"{SECRET}\n"  # as from a file
        monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", key)
        image = project.root / "vet/images/0-red.png"
        whole = image.read_bytes()
        if fault == "a broken image":
            image.write_bytes(b"no image")
        with judge_server(FAULTS.get(fault, lambda body: completion("0.5"))) as server:
            done = project.train_here(named(server.url))
            sent = {headers.get("Authorization") for _, headers, _ in server.requests}
        image.write_bytes(whole)
        assert sent == ({f"Bearer {SECRET}"} if fault in FAULTS else set()), fault
        assert (done.returncode == 0) is (fault == "a reply that holds it"), fault
        said += done.stdout + done.stderr
    files = [path for path in project.store.rglob("*") if path.is_file()]
    assert {"run.json", "log.txt", "report.html", "job.json", "error.txt"} - {path.name for path in files} <= {
        "job.json"
    }
    seen = b"".join(map(Path.read_bytes, files)).decode("utf-8", "replace") + said + caplog.text
    for secret in (SECRET, *others.values()):
        assert not [form for form in (secret, secret.encode().hex(), repr(f"{secret}\n")[1:-1]) if form in seen]
