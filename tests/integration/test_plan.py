"""A plan made behind a finished run says of it what the run itself has recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.integration.project import tiny_project
from tinylmm.config.compose import compose_run, run_name
from tinylmm.models.lmm import LMM
from tinylmm.planning.estimates import estimate_record
from tinylmm.planning.planner import plan_run


def test_a_plan_of_a_finished_run_agrees_with_its_manifests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = tiny_project(tmp_path)
    done = project.train_here()
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(project.root)
    run = compose_run(project.words)
    rows = {row["stage"]: row for row in estimate_record([plan_run(run, run_name(run))])["stages"]}
    manifests = [json.loads((stage / "manifest.json").read_text()) for stage in project.stages("train")]
    assert rows.keys() == {manifest["name"] for manifest in manifests}
    for manifest in manifests:
        row, summary = rows[manifest["name"]], manifest["summary"]
        assert row["status"] == "complete" and row["lengths"] == "read from the prepared data"
        counted = {part: {"total": d["total"], "trained": d["trained"]} for part, d in summary["tuning"].items()}
        assert row["parameters"] == counted
        assert row["samples"] == summary["data"]["samples"] and row["steps"] == summary["steps"]
        assert row["samples"] * row["tokens_a_sample"] == pytest.approx(summary["data"]["tokens"])
        assert row["features_cached"] == summary["features_cached"]


def test_a_training_that_runs_out_of_memory_ends_with_the_plans_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    monkeypatch.setattr(LMM, "forward", forward)  # the first thing that a step does, in the real trainer and runner
    done = tiny_project(tmp_path).train_here()
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "train pretrain failed with OutOfMemoryError: CUDA out of memory. Tried to allocate 3.00 GiB." in said
    assert "Out of memory: tinylmm plan predicts" in said
    assert " MiB for local x1 (weights " in said and "and give the same command again." in said
