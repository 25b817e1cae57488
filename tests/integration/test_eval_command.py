"""`tinylmm eval`: benchmarks on a model that is there, in the digests that a training run would have."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tests.integration.project import Project, tiny_project, write_images
from tests.unit.evaluation.benchmarks.disk import write_jsonl
from tinylmm.cli.main import app, main
from tinylmm.errors import ConfigError
from tinylmm.generation.cache import cache_kind
from tinylmm.generation.fixed import FixedDecoder
from tinylmm.generation.fixed_plan import Granules
from tinylmm.store.gc import collect_garbage, list_stored

MODEL_WORDS = ("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with a finished run called `mine`, whose model nothing was asked of."""
    root = tmp_path_factory.mktemp("eval")
    made = tiny_project(root)
    names = write_images(root / "shapes/images")
    rows = [
        {"question_id": n, "image": name, "text": "Which colour?", "category": "colour", "answer": "red", "options": 3}
        for n, name in enumerate(names)
    ]
    write_jsonl(root / "shapes/test.jsonl", rows)
    project = Project(root, (*made.words, *MODEL_WORDS))
    assert project.train_here("name=mine").returncode == 0
    (root / "exported").mkdir()
    (root / "exported/config.json").write_text(json.dumps({"model_type": "llava"}))
    return project


@pytest.fixture
def ask(trained: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Run `tinylmm eval` in the project's folder; returns exit code and output."""

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tinylmm", "eval", *words])
        said = io.StringIO()
        with (
            contextlib.chdir(trained.root),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
            pytest.raises(SystemExit) as left,
        ):
            main()
        return int(left.value.code or 0), said.getvalue()

    return run


def benchmark(project: Project) -> list[str]:
    return [
        "eval=gqa",
        "eval.gqa.benchmark=digits",
        f"eval.gqa.root={project.root / 'shapes'}",
        "eval.gqa.max_new_tokens=3",
    ]


def evaluations(project: Project) -> set[str]:
    return {path.name for path in project.stages("eval")}


def test_a_run_is_evaluated_by_name_and_a_training_run_reuses_the_answers(
    trained: Project, ask: Callable[..., tuple[int, str]]
) -> None:
    words = benchmark(trained)
    code, said = ask("mine", *words, "name=later")
    assert code == 0 and "accuracy" in said, said
    found = evaluations(trained)
    record = json.loads((trained.store / "runs/later/run.json").read_text())
    assert [(row["kind"], row["name"], row["status"]) for row in record["stages"]] == [
        ("train", "finetune", "reused"),
        ("eval", "gqa@finetune", "run"),
    ]
    again = trained.train_here(*[word for word in words if word != "eval=none"], "name=whole")
    assert again.returncode == 0, again.stderr
    assert evaluations(trained) == found
    code, said = ask(str(trained.model("finetune")), *words, "name=by_folder")
    assert code == 0 and evaluations(trained) == found
    assert "<html" in (trained.store / "reports/later/report.html").read_text().lower()


def test_questions_asked_in_fixed_shapes_as_on_a_gpu_get_the_same_answers(
    trained: Project, ask: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without images: both modes share one decoder, and the record says that batches make no difference."""

    def answers(*words: str) -> tuple[list[str], dict[str, Any]]:
        before = evaluations(trained)
        code, said = ask("mine", *benchmark(trained), "eval.gqa.blind=true", *words)
        assert code == 0, said
        (made,) = (path for path in trained.stages("eval") if path.name not in before)
        rows = (made / "output/generations.jsonl").read_text().splitlines()
        scores: dict[str, Any] = json.loads((made / "output/scores.json").read_text())
        return [json.loads(row)[text] for row in rows for text in ("text", "blind_text")], scores

    plain, _ = answers("name=plain", "eval.gqa.limit=4")
    decoders: list[FixedDecoder] = []

    def always(llm: nn.Module, ends: frozenset[int], tokens: int) -> FixedDecoder:
        decoders.append(FixedDecoder(llm, cache_kind(llm), ends, tokens, Granules(4, 2, 8)))
        return decoders[-1]

    monkeypatch.setattr("tinylmm.stages.evaluate.fixed_on_gpu", always)
    fixed, scores = answers("name=fixed", "eval.gqa.limit=4", "eval.gqa.max_new_tokens=2")
    assert all(fixed) and all(long.startswith(short) for long, short in zip(plain, fixed, strict=True))
    assert len(decoders) == 1 and decoders[0].refused is None and len(decoders[0].steps()) == 2
    assert scores["generation"]["batch_independent"] is True


def test_a_model_from_elsewhere_is_known_by_its_content_wherever_it_lies(
    trained: Project, ask: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    elsewhere = Path(shutil.copytree(trained.model("finetune"), tmp_path / "imported"))
    before = evaluations(trained)
    code, said = ask(str(elsewhere), *benchmark(trained), "name=foreign")
    assert code == 0 and "accuracy" in said, said
    (made,) = evaluations(trained) - before
    rows = json.loads((trained.store / "reports/foreign/results.json").read_text())["rows"]
    assert {row["stage"] for row in rows} == {"imported"}
    code, said = ask(str(elsewhere.rename(tmp_path / "moved")), *benchmark(trained), "name=moved")
    assert code == 0 and evaluations(trained) - before == {made}
    same = [
        json.loads((trained.store / f"reports/{run}/results.json").read_text())["rows"] for run in ("foreign", "later")
    ]
    assert same[0][0]["value"] == same[1][0]["value"]


def test_an_exported_checkpoint_is_imported_once_and_answers_like_its_model(
    trained: Project, ask: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    app(["export", str(trained.model("finetune")), str(tmp_path / "hf")], standalone_mode=False)
    code, said = ask(str(tmp_path / "hf"), *benchmark(trained), "name=of_hf")
    assert code == 0 and f"read {tmp_path / 'hf'} as" in said, said
    mine, theirs = (
        json.loads((trained.store / f"reports/{run}/results.json").read_text())["rows"] for run in ("later", "of_hf")
    )
    assert theirs[0]["value"] == mine[0]["value"]
    before = evaluations(trained)
    code, said = ask(str((tmp_path / "hf").rename(tmp_path / "moved")), *benchmark(trained), "name=again")
    assert code == 0 and "kept as" not in said and evaluations(trained) == before, said


def test_an_imported_checkpoint_is_listed_and_goes_when_nobody_used_it_for_long(
    trained: Project, ask: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    app(["export", str(trained.model("finetune")), str(tmp_path / "hf")], standalone_mode=False)
    assert ask(str(tmp_path / "hf"), *benchmark(trained), "name=once_more")[0] == 0
    (kept,) = (path for path in (trained.store / "imported").iterdir() if path.is_dir())
    assert [row.key for row in list_stored(trained.store) if row.kind == "imported"] == [kept.name]

    def unused() -> list[str]:
        return [row.key for row in collect_garbage(trained.store, set()) if row.folder.startswith("imported")]

    assert unused() == []
    os.utime(kept / "config.json", (0, 0))
    assert unused() == [kept.name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nobody", "eval=gqa"], "neither a folder nor the name of a run"),
        (["mine", "eval=gqb"], "Did you mean 'gqa'"),
        (["mine", "eval=gqa"], "questions of benchmark gqa"),
        (["exported", "eval=gqa"], "exported"),
        (["mine"], "asks nothing"),
        (["mine", "eval=none"], "asks nothing"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_starts(
    words: list[str], said: str, ask: Callable[..., tuple[int, str]], trained: Project
) -> None:
    runs = sorted(path.name for path in (trained.store / "runs").iterdir())
    code, text = ask(*words)
    assert code == 2 and said in " ".join(text.split()), text
    assert sorted(path.name for path in (trained.store / "runs").iterdir()) == runs


@pytest.mark.parametrize("command", ["check", "show"])
def test_a_run_that_trains_nothing_has_no_data_to_look_at(
    command: str, trained: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.root)
    with pytest.raises(ConfigError, match="recipe: is evaluate, which trains nothing, so there is no data to look at"):
        app(["data", command, "recipe=evaluate", "recipe.from_model=mine"], standalone_mode=False)
