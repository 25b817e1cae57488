"""A plan made behind a finished run says of it what the run itself has recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.project import tiny_project
from tinylmm.config.compose import compose_run, run_name
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
