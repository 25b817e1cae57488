"""`tinylmm verify` on a tiny project: what it proves, that a leak of one token fails it, and what it leaves."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import folder_bytes
from tests.integration.project import Project, tiny_project
from tinylmm.cli.errors import guarded
from tinylmm.cli.main import app
from tinylmm.models.lmm import LMM
from tinylmm.reports.collect import collect_report
from tinylmm.reports.html import render_html
from tinylmm.reports.tables import render_markdown
from tinylmm.store.certificates import read_certificate

ROOMY = ("recipe.stages.finetune.max_length=256", "recipe.stages.finetune.max_steps=1")
"""Samples are not cut, and so of different lengths."""


def verify(project: Project, *words: str) -> tuple[int, str]:
    """Exit code and what is said."""
    said = io.StringIO()

    def command() -> int | None:
        return app(["verify", *project.words, *ROOMY, *words], standalone_mode=False)

    with contextlib.chdir(project.root), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = guarded(command)
    return code, said.getvalue()


def leak_one_token(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model in whose rows the second sample sees the last token of the first."""

    def leaky(self: LMM, input_ids: Tensor, position_ids: Tensor, targets: Tensor, **others: Any) -> Any:
        positions = position_ids.clone()
        for row in range(len(positions)):
            begins = [*(positions[row] == 0).nonzero().flatten().tolist(), positions.shape[1]]
            if len(begins) > 2 and targets[row, begins[1] : begins[2]].ge(0).any():  # no padding
                first, end = begins[1] - 1, begins[2]
                positions[row, first:end] = torch.arange(end - first)
        others.pop("layout", None)  # what was made of the right positions
        return forward(self, input_ids=input_ids, position_ids=positions, targets=targets, **others)

    return leaky


def test_a_leak_of_one_token_between_samples_fails_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path)
    monkeypatch.setattr(LMM, "forward", leak_one_token(LMM.forward))
    code, said = verify(project, "--stage", "pretrain", "--path", "packing", "--path", "accumulation")
    assert code == 1, said
    assert "NOT VERIFIED: pretrain: other than a plain reference: packing\n" in said
    for row in ("all off equal", "accumulation equal", "packing differs"):
        assert f"pretrain: {row}" in said
    assert not (project.store / "certificates").exists(), "one path alone is no certificate"


def test_rows_that_nobody_shares_prove_nothing(tmp_path: Path) -> None:
    words = ("--stage", "pretrain", "--path", "packing", "--samples", "1")
    code, said = verify(tiny_project(tmp_path), *words)
    assert code == 0 and "packing: not run here: a step has one sample" in said


def test_an_unknown_path_or_stage_is_refused_with_those_there_are(project: Project) -> None:
    code, said = verify(project, "--path", "pakcing")
    assert code == 2 and "--path pakcing: there is none; there are packing, attention:" in said
    code, said = verify(project, "--stage", "tune")
    assert code == 2 and "--stage tune: there is none; there are pretrain, finetune." in said


@pytest.mark.slow
def test_every_path_of_a_run_is_equal_and_its_report_carries_the_certificates(tmp_path: Path) -> None:
    project = tiny_project(tmp_path)
    assert project.train_here(*ROOMY).returncode == 0
    report = collect_report(project.store)
    assert "not verified" in render_html(report) and "not verified" in render_markdown(report)
    before = folder_bytes(project.store / "stages")
    code, said = verify(project)
    assert code == 0, said
    for stage in ("pretrain", "finetune"):
        assert f"verified: {stage}: equal to a plain reference in " in said
    assert "attention: flash_attention_2: not run here:" in said and "launch: not run here:" in said
    assert folder_bytes(project.store / "stages") == before, "the user's stages are read alone"
    files = sorted((project.store / "certificates").glob("*.json"))
    assert len(files) == 2
    for certificate in map(read_certificate, files):
        rows = {path.name: path for path in certificate.paths}
        assert rows["packing"].compared["weights"].keys() >= {"connector"}
        assert rows["ranks"].status == rows["resume"].status == "equal"
    pages = collect_report(project.store)
    assert render_html(pages).count("equal to a plain reference") == 2 and files[0].name in render_html(pages)
    assert "equal to a plain reference in" in render_markdown(pages)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_the_runs_own_launch_is_verified_too(launch: str, tmp_path: Path) -> None:
    words = (f"launch={launch}", "launch.nproc=2", "--stage", "pretrain", "--path", "launch")
    code, said = verify(tiny_project(tmp_path), *words)
    assert code == 0, said
    assert "pretrain: launch equal" in said and "gradients are spread over the ranks" in said


@pytest.mark.slow
def test_adapters_are_verified_without_their_dropout(tmp_path: Path) -> None:
    words = ("recipe=lora", "recipe.stages.finetune.tune.llm.lora.r=4", "--stage", "finetune", "--path", "packing")
    code, said = verify(tiny_project(tmp_path), *words)
    assert code == 0 and "finetune: packing equal" in said, said


@pytest.mark.slow
def test_bf16_is_held_against_the_references_own_rounding_and_a_leak_is_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tiny_project(tmp_path)
    words = ("recipe.stages.pretrain.precision=bf16", "launch.device=cpu", "--stage", "pretrain", "--path", "packing")
    code, said = verify(project, *words)
    assert code == 0 and "in bf16 on cpu" in said and "pretrain: packing equal" in said, said
    monkeypatch.setattr(LMM, "forward", leak_one_token(LMM.forward))
    code, said = verify(project, *words)
    assert code == 1 and "NOT VERIFIED: pretrain: other than a plain reference: packing\n" in said, said


@pytest.mark.slow
def test_a_bf16_recipe_without_a_gpu_is_compared_in_fp32_and_that_is_said(tmp_path: Path) -> None:
    words = ("recipe.stages.pretrain.precision=bf16", "--stage", "pretrain", "--path", "accumulation")
    code, said = verify(tiny_project(tmp_path), *words)
    expected = ("in fp32 on cpu", "bf16: no GPU here, so it was compared in fp32")
    assert torch.cuda.is_available() or (code == 0 and all(one in said for one in expected)), said
