"""`python -m benchmarks.gpu`: every code path at tiny size on the CPU, so that it runs the first time that it meets a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_sections.kernels import kind_of, summary
from benchmarks.gpu_sections.ours import planned_of
from benchmarks.gpu_sections.sections import SECTIONS, TECHNIQUES
from benchmarks.gpu_sections.setting import Setting, write_prepared
from tinylmm.config.compose import compose_run
from tinylmm.planning.choose import fit_of


def measured(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *words]) == 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert record["device"] and record["versions"]["torch"] and record["versions"]["transformers"]
    return record


def test_every_section_measures_at_tiny_size(tmp_path: Path) -> None:
    assert set(SECTIONS) == set(gpu.NAMES) and sum(gpu.LIMITS.values()) <= gpu.BUDGET < 480
    quick = [name for name in gpu.NAMES if name != "techniques"]  # they have a test of their own
    rows = measured(tmp_path, "--here", "--llms", "qwen2_5_0_5b", "--sections", ",".join(quick))["rows"]
    expected = {"machine": 1, "steps": 4, "generation": 7, "trainer": 2, "kernels": 2, "unchecked": 2, "planner": 2}
    assert Counter(row["section"] for row in rows) == expected
    steps = [row for row in rows if row["section"] == "steps"]
    for ours, plain in zip(steps[::2], steps[1::2], strict=True):
        assert (ours["side"], plain["side"]) == ("ours", "plain") and ours["stage"] == plain["stage"]
        assert (
            abs(ours["loss"] - plain["loss"]) < 0.5
        )  # the same samples, other random weights: about log(vocabulary) both
        assert ours["samples_per_s"] > 0 and ours["tflop_a_sample"] > 0 and ours["share_of_matmul"] > 0
    answers = {(row["precision"], row["way"]): row for row in rows if row["section"] == "generation"}
    for way in ("engine", "recorded"):
        exact = answers["fp32", way]
        assert exact["equal_to_one_at_a_time"] == exact["equal_at_batch_1_and_64"] == 1 and exact["promised"]
    for way in ("recorded", "launched"):
        narrow = answers["bf16", way]
        assert narrow["refused"] is None and narrow["rows_alike"] and narrow["promised"] and narrow["say_ms"] > 0
        assert narrow["equal_at_batch_1_and_64"] == 1 and "shared=0" not in narrow["shape"]


@pytest.mark.slow
def test_every_technique_is_measured_off_and_on_and_changes_no_loss(tmp_path: Path) -> None:
    rows = measured(tmp_path, "--here", "--llms", "tinyllama", "--sections", "techniques")["rows"]
    assert [(row["technique"], row["stage"]) for row in rows] == [(t.name, s) for t in TECHNIQUES for s in t.stages]
    for row in rows:
        assert row["loss_difference"] < 1e-3, row["technique"]


@pytest.mark.slow
def test_sections_are_processes_of_their_own_that_share_what_was_measured(tmp_path: Path) -> None:
    record = measured(tmp_path, "--sections", "planner,machine,steps", "--llms", "tinyllama,phi2")
    assert list(record["sections"]) == ["machine", "steps", "planner"]
    assert {one["outcome"] for one in record["sections"].values()} == {"done"}
    planned = [(row["llm"], row["stage"]) for row in record["rows"] if row["section"] == "planner"]
    assert planned == [(row["llm"], row["stage"]) for row in record["rows"] if row.get("side") == "ours"]


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("import time; time.sleep(3600)", "ended at its limit of 1 s"),
        ("raise ValueError('no such kernel')", "no such kernel"),
    ],
)
def test_a_section_that_hangs_or_fails_says_so(
    code: str, outcome: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "steps.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    monkeypatch.setitem(gpu.LIMITS, "steps", 1 if "sleep" in code else 600)
    said = gpu._await(argparse.Namespace(tiny=False), "steps", process, tmp_path, 10_000.0)
    assert outcome in said and process.returncode is not None


def test_without_a_gpu_nothing_is_measured_and_a_cpu_is_asked_for_tiny_shapes_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert "no CUDA GPU was found" in capsys.readouterr().out and not (tmp_path / "gpu.json").exists()
    for words, said in ((["--device", "cpu"], "--tiny alone"), (["--sections", "steps,stairs"], "'stairs'")):
        with pytest.raises(SystemExit) as ended:
            gpu.main(words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_trace_is_summed_up_by_kind_with_the_time_that_the_device_was_idle() -> None:
    events = [
        {"name": "ampere_bf16_gemm_128", "ts": 0.0, "dur": 40.0},
        {"name": "flash_fwd_kernel", "ts": 30.0, "dur": 20.0},  # 10 of them beside the product
        {"name": "vectorized_elementwise_kernel", "ts": 80.0, "dur": 20.0},
    ]
    found = summary(events)
    assert found["wall_ms"] == 0.1 and abs(found["idle_share"] - 0.3) < 1e-9 and found["kernels"] == 3
    assert found["shares"] == {"products": 0.5, "attention": 0.25, "elementwise": 0.25}
    assert kind_of("Memcpy HtoD") == "copies" and kind_of("cudnn_secret") == "other"
    with pytest.raises(RuntimeError, match="seen no kernel"):
        summary([])


MEASURED = [row for row in json.loads(gpu.RESULT.read_text(encoding="utf-8"))["rows"] if row.get("side") == "ours"]
"""Trainings on one H200, at the published batch sizes."""


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: f"{row['llm']}-{row['stage']}")
def test_the_plan_foretells_memory_and_time_that_were_measured_on_an_h200(row: dict[str, Any], tmp_path: Path) -> None:
    assert row["at_once"] == 20480
    words = [f"llm={row['llm']}", "vt=siglip", "recipe=base", "eval=none", "launch.gpu=h200", "launch.device=cuda"]
    run = compose_run([*words, "launch.cache_features=false", "launch.row_tokens=20480"])
    setting = Setting(torch.device("cpu"), False, (row["llm"],), tmp_path, lambda _: None)
    data = write_prepared(setting, row["stage"], int(run.llm.architecture["vocab_size"]))
    planned = planned_of(setting, run, row["stage"], data)
    assert planned.stage.global_batch == setting.batch(row["stage"])
    memory, seconds = fit_of(planned).memory, planned.seconds_a_step(planned.placement())
    assert (memory.total - memory.fragmentation) / 2**30 == pytest.approx(row["peak_gib"], rel=0.1)
    assert seconds == pytest.approx(row["seconds_a_step"], rel=0.15)
