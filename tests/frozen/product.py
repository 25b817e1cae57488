"""All that the frozen tests use of the product, in one place: when modules move, only these imports change.

What is heavy (torch) is imported where it is called, so that digests are compared in a moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.builders import describe, tiny_loaded, tiny_tokenizer
from tests.integration.project import Project, tiny_project
from tests.unit.evaluation.benchmarks import qa_folders
from tests.unit.reports.conftest import StoreBuilder
from tinylmm.cli.main import app
from tinylmm.config.compose import compose_run
from tinylmm.config.spec import DataSpec, EvalSpec
from tinylmm.config.targets import resolve_target
from tinylmm.planning.graph import MISSING, build_graph
from tinylmm.planning.kinds import KINDS, Kind
from tinylmm.planning.planner import plan_run
from tinylmm.store.stage import Stage

__all__ = ["Project", "Stage", "StoreBuilder", "compose_run", "qa_folders", "resolve_target", "tiny_project"]


VERSIONS = {"data": 2, "parts": 1, "images": 1, "prepare": 1, "train": 1, "eval": 2, "judge": 1}
"""Of the kinds' code when digests were frozen. A version is raised when results change, which moves every digest behind it;
what else is in a digest is compared at these."""


def freeze_versions(setitem: Callable[[dict[str, Kind], str, Kind], None]) -> None:
    """Give the kinds of stages the versions of then."""
    for kind, row in KINDS.items():
        setitem(KINDS, kind, replace(row, version=VERSIONS[kind]))


def stages(words: list[str]) -> list[Stage]:
    """The stages of the run that these words ask for, in order, where every file outside the store is a made-up one."""
    return list(build_graph(compose_run(words), _MadeUp()))


def planned(words: list[str]) -> list[Stage]:
    """The stages of the run that these words ask for, from the files that lie on disk."""
    plan = plan_run(compose_run(words), "run")
    return list(plan.graph)


class _MadeUp:
    """Stands for files' content: in the form of the real ones, made of names alone."""

    def source(self, data: DataSpec, name: str) -> dict[str, Any]:
        source = data.sources[name]
        return {"annotations": _hash(source.annotations), "images": _hash(f"images of {source.images}")}

    def benchmark(self, spec: EvalSpec) -> dict[str, Any]:
        if spec.optional:
            return {MISSING: spec.benchmark}
        about = [spec.benchmark, spec.layout, spec.limit, spec.options]
        return {"items": _hash(json.dumps(about, sort_keys=True)), "images": _hash(f"images of {spec.benchmark}")}

    def stage_of(self, model: str) -> None:
        return None

    def model(self, folder: str) -> dict[str, Any]:
        return {"files": {"config.json": _hash("model"), "llm/model.safetensors": _hash("weights")}}

    def checkpoint(self, path_or_id: str) -> dict[str, Any]:
        parts = [_folder(part) for part in path_or_id.split("+")]
        if not any(parts):
            return {}
        if len(parts) == 1:
            return parts[0]
        return {"parts": [found or {"id": part} for found, part in zip(parts, path_or_id.split("+"), strict=True)]}


def _folder(path: str) -> dict[str, Any]:
    """A folder's content where the path is absolute, nothing for a hub id."""
    name = Path(path).name
    return {"files": {"config.json": {"size": len(name), "sha256": _hash(name)}}} if path.startswith("/") else {}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def train(project: Project) -> None:
    """Carry out the project's run in this process."""
    done = project.train_here()
    assert done.returncode == 0, done.stderr


def failing(project: Project) -> None:
    """Carry out the project's run in this process, which stops at a stage that fails."""
    done = project.train_here()
    assert done.returncode != 0, done.stdout


def printed_plan(folder: Path, words: list[str]) -> dict[str, Any]:
    """What `tinylmm plan --json` prints in `folder`; in this process, where versions can be those of then."""
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        app(["plan", "--json", *words], standalone_mode=False)
    plan: dict[str, Any] = json.loads(printed.getvalue())
    return plan


def report_of(store: Path) -> dict[str, Any]:
    """The results.json of the newest run's report."""
    from tinylmm.reports.write import write_report

    results: dict[str, Any] = json.loads(write_report(store).results.read_text(encoding="utf-8"))
    return results


def save_tiny(folder: Path) -> None:
    """Save the tests' tiny model."""
    from tinylmm.models.checkpoint import save_model

    save_model(tiny_loaded(), folder, None, {})


def save_small(words: list[str], folder: Path) -> None:
    """Build the model that these words begin with, of random parts, and save it as the first training stage would."""
    from tests.builders import build
    from tinylmm.models.checkpoint import LoadedModel, save_model

    spec = next(stage.spec for stage in stages(words) if stage.kind == "train")
    scaled = spec.get("scale_image_features", False)
    model = build(spec)
    description = describe(spec, spec["tower_output"], spec["connector"], spec["chat_template"], scaled)
    save_model(LoadedModel(model, tiny_tokenizer(), description, None), folder, None, {})


def load(folder: Path) -> Any:
    """The model in a folder, as an object with `model`, `tokenizer` and `description`."""
    from tinylmm.models.checkpoint import load_model

    return load_model(folder, [])


def save_tokenizer(folder: Path) -> None:
    """Save the tests' tiny tokenizer."""
    tiny_tokenizer().save_pretrained(folder)
