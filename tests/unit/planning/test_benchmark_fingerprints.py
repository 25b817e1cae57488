"""A benchmark's files decide an evaluation's identity by content; what is missing stops a run before it starts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.project import write_images
from tests.unit.evaluation.benchmarks.disk import write_json
from tinylmm.config.compose import compose_run
from tinylmm.config.spec import EvalSpec
from tinylmm.errors import ConfigError, DataError
from tinylmm.evaluation.benchmarks.digits import Digits
from tinylmm.planning.fingerprints import benchmark_fingerprint
from tinylmm.planning.planner import RunPlan, plan_record, plan_run, require_files
from tinylmm.store.stage import Stage

ROW = {"question_id": "1", "text": "what?", "category": "digit", "answer": "3", "options": 10}


def write_benchmark(root: Path) -> Path:
    names = write_images(root / "images")
    (root / "test.jsonl").write_text("".join(json.dumps({**ROW, "image": name}) + "\n" for name in names))
    return root


def identity(root: Path, cache: Path, limit: int | None = None) -> tuple[str, str]:
    spec = EvalSpec(benchmark="digits", root=str(root), limit=limit, max_new_tokens=8)
    found = benchmark_fingerprint(Digits(), spec, cache)
    assert found["num_missing"] == 0
    return found["items"], found["images"]


def test_the_same_questions_anywhere_are_the_same_and_any_change_is_another(tmp_path: Path) -> None:
    here, cache = write_benchmark(tmp_path / "a"), tmp_path / "cache"
    first = identity(here, cache)
    assert identity(here, cache) == first  # from the cache this time
    there = Path(shutil.copytree(here, tmp_path / "b"))
    assert identity(there, tmp_path / "other") == first
    assert identity(here, cache, limit=3)[0] != first[0]
    questions = here / "test.jsonl"
    questions.write_text(questions.read_text().replace('"answer": "3"', '"answer": "4"', 1))
    os.utime(questions, ns=(1, 1))
    assert identity(here, cache)[0] != first[0]
    (there / "images/0-red.png").write_bytes(b"longer than it was before" * 50)
    assert identity(there, tmp_path / "other")[0] == first[0] and identity(there, tmp_path / "other")[1] != first[1]


def plan(tmp_path: Path, root: Path, *words: str) -> RunPlan:
    named = ("eval=gqa", "eval.gqa.benchmark=digits", f"eval.gqa.root={root}", f"store={tmp_path / 'store'}")
    return plan_run(compose_run([*named, *words]), "run")


def digest(planned: RunPlan) -> str:
    return next(stage.digest for stage in planned.graph if stage.kind == "eval")


def test_the_digest_holds_content_and_protocol_but_no_place(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "a")
    planned = plan(tmp_path, root)
    require_files(planned)
    (stage,) = [stage for stage in planned.graph if stage.kind == "eval"]
    assert stage.name == "gqa@finetune" and set(stage.parents) == {"model"}
    assert str(tmp_path) not in json.dumps(stage.spec)
    assert stage.settings["location"]["root"] == str(root)
    moved = root.rename(tmp_path / "b")
    assert digest(plan(tmp_path, moved)) == stage.digest
    same = plan(tmp_path, moved, "launch.eval_batch=1", "launch.eval_tokens=9")
    assert digest(same) == stage.digest
    limit = "eval.gqa.limit=3"
    changes = ([limit], [limit, "eval.gqa.limit_seed=1"], ["eval.gqa.max_new_tokens=3"])
    assert len({stage.digest, *(digest(plan(tmp_path, moved, *words)) for words in changes)}) == 4
    assert (
        digest(plan(tmp_path, moved, "eval.gqa.limit_seed=0")) == stage.digest
    )  # later fields, where they are not set


def test_a_judgement_is_of_its_judge_at_whatever_address_and_of_how_often_it_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Digits, "may_be_judged", True)
    monkeypatch.setattr(Digits, "averages_runs", True)
    root = write_benchmark(tmp_path / "a")

    def judged(*words: str) -> Stage:
        judge = ("eval.gqa.judge.model=m", "eval.gqa.judge.base_url=http://localhost:1/v1")
        return next(stage for stage in plan(tmp_path, root, *judge, *words).graph if stage.kind == "judge")

    stage = judged()
    assert stage.settings["location"]["judge_url"] == "http://localhost:1/v1"
    assert stage.parents["answers"] == digest(plan(tmp_path, root)) == digest(plan(tmp_path, root))
    same = ("eval.gqa.judge.runs=1", "eval.gqa.judge.base_url=http://localhost:2/v1")
    assert {judged(word).digest for word in same} == {stage.digest}
    assert len({stage.digest, judged("eval.gqa.judge.model=n").digest, judged("eval.gqa.judge.runs=5").digest}) == 3


def test_a_judged_benchmark_without_its_judge_is_planned_as_waiting(tmp_path: Path) -> None:
    planned = plan_run(compose_run(["eval=mmvet", f"eval.mmvet.root={tmp_path}", f"store={tmp_path / 'store'}"]), "run")
    assert {s["kind"]: s["status"] for s in plan_record([planned])["stages"]}["judge"] == "waits"
    (said,) = planned.warnings
    assert said.startswith(
        "mmvet@finetune: mmvet is scored by a judge, and none is named. Set eval.mmvet.judge.base_url"
    )


def test_missing_files_stop_a_run_before_it_starts_naming_each(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "a")
    (root / "images/1-green.png").unlink()
    with pytest.raises(DataError, match=r"1 of 12 images of benchmark digits \(images/1-green\.png\)"):
        require_files(plan(tmp_path, root))
    with pytest.raises(DataError, match=r"questions of benchmark digits(.|\n)*nowhere(.|\n)*does not exist"):
        require_files(plan(tmp_path, tmp_path / "nowhere"))


def test_reading_a_benchmark_loads_neither_torch_nor_pillow(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path / "a")
    code = f"""
import sys, pathlib
from tinylmm.config.spec import EvalSpec
from tinylmm.evaluation.benchmarks.digits import Digits
from tinylmm.planning.fingerprints import benchmark_fingerprint
spec = EvalSpec(benchmark="digits", root={str(root)!r}, max_new_tokens=8)
benchmark_fingerprint(Digits(), spec, pathlib.Path({str(tmp_path)!r}))
print([name for name in ("torch", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_scoring_variant_is_refused_when_planning(tmp_path: Path) -> None:
    run = compose_run(["eval=gqa", "eval.gqa.variant=oficial", f"store={tmp_path}"])
    with pytest.raises(ConfigError, match=r"eval\.gqa\.variant: 'oficial' is unknown\. Did you mean 'official'\?"):
        plan_run(run, "run")


def test_eval_auto_asks_what_is_there_and_the_plan_names_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TINYLMM_DATA", str(tmp_path))
    write_benchmark(tmp_path / "eval/gqa")
    broken = write_benchmark(tmp_path / "eval/pope")
    (broken / "images/1-green.png").unlink()
    words = ["llm=phi2", "vt=siglip", "eval.gqa.benchmark=digits", "eval.pope.benchmark=digits", f"store={tmp_path}/s"]
    planned = plan_run(compose_run(words), "run")
    assert [stage.name for stage in planned.graph if stage.kind == "eval"] == ["gqa@finetune"]
    record = plan_record([planned])
    left_out = {item["what"] for item in record["not_found"]}
    assert "questions of benchmark mmvet" in left_out and len(left_out) == 8
    assert "1 of 12 images of benchmark digits (images/1-green.png)" in left_out
    assert not any("benchmark" in item["what"] for item in record["missing"])
    strict = plan_record([plan_run(compose_run([*words, "eval=paper"]), "run")])
    assert left_out <= {item["what"] for item in strict["missing"]} and strict["not_found"] == []


def test_what_eval_auto_asks_waits_for_no_judge(tmp_path: Path) -> None:
    vet = write_benchmark(tmp_path / "vet")
    (vet / "llava-mm-vet.jsonl").write_text('{"question_id": 0, "image": "0-red.png", "text": "What?"}\n')
    answer = {"imagename": "0-red.png", "question": "What?", "answer": "red", "capability": ["rec"], "imagesource": ""}
    (vet / "mm-vet.json").write_text(json.dumps({"v1_0": answer}))
    words = ["llm=phi2", "vt=siglip", f"eval.mmvet.root={vet}", f"store={tmp_path}/s"]
    kinds = [stage.kind for stage in plan_run(compose_run(words), "run").graph if stage.name == "mmvet@finetune"]
    assert kinds == ["eval"]
    judge = "eval.mmvet.judge={base_url: http://localhost:1/v1, model: m}"
    kinds = [stage.kind for stage in plan_run(compose_run([*words, judge]), "run").graph if "mmvet" in stage.name]
    assert kinds == ["eval", "judge"]


def test_videos_that_are_missing_stop_a_run_before_it_starts_and_frames_decide_its_digest(tmp_path: Path) -> None:
    record = {"video": "a.mp4", "question": "What?", "candidates": ["x", "y"], "answer": "y"}
    write_json(tmp_path / "MVBench/json/moving_count.json", [record])
    words = ["eval=mvbench", f"eval.mvbench.root={tmp_path}/MVBench", f"store={tmp_path / 'store'}"]
    missing = plan_record([plan_run(compose_run(words), "run")])["missing"]
    assert any("clevrer/video_validation/a.mp4" in item["what"] for item in missing)
    video = tmp_path / "MVBench/video/clevrer/video_validation/a.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"not looked into by a plan")
    plain = plan_run(compose_run(words), "run")
    assert not plan_record([plain])["missing"]
    changes = ("frames=middle", "frames=shuffled", "sampling={uniform: 4}")
    others = {digest(plan_run(compose_run([*words, f"eval.mvbench.{change}"]), "run")) for change in changes}
    assert len({digest(plain), *others}) == 4
