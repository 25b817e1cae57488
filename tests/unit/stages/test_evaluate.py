"""The eval stage: answers survive kills, ranks share the work, scores say how sure they are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import tinylmm
from tests.builders import tiny_loaded
from tests.integration.project import environment, write_images
from tests.unit.evaluation.benchmarks.test_mmbench import question, write_tsv
from tests.unit.evaluation.judge_server import completion, judge_server
from tests.unit.generation.test_prompts import model_that_ends_turns
from tinylmm.errors import ConfigError, DataError, StoppedError
from tinylmm.evaluation.answers import AnswerFile, read_answers, shard
from tinylmm.evaluation.benchmarks.digits import Digits
from tinylmm.evaluation.benchmarks.records import ImageRef, ItemScore, Scores
from tinylmm.evaluation.images import open_image_ref
from tinylmm.evaluation.judge import Judge
from tinylmm.launch.backends import torchrun
from tinylmm.models.checkpoint import save_model
from tinylmm.planning.kinds import KINDS
from tinylmm.reports.stored import read_generations
from tinylmm.stages import evaluate, judging
from tinylmm.stages.job import StageJob, make_job
from tinylmm.stages.scoring import read_items

QUESTIONS_AN_IMAGE = 5
LAUNCH = {
    "device": "cpu",
    "attention": "auto",
    "eval_batch": 8,
    "eval_tokens": 100_000,
    "start_timeout_s": 60,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random model; the `output` folder of a train stage."""
    output = tmp_path_factory.mktemp("train-0123") / "output"
    output.mkdir()
    save_model(tiny_loaded(), output / "model", None, {})
    return output


def write_questions(root: Path) -> int:
    names = write_images(root / "images")
    rows = [
        {
            "question_id": f"{name}-{n}",
            "image": name,
            "text": f"what is it? {'please ' * n}",
            "category": "odd" if n % 2 else "even",
            "answer": "a red 3",
            "options": 4,
        }
        for n in range(QUESTIONS_AN_IMAGE)
        for name in names
    ]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return len(rows)


def job_of(folder: Path, model: Path, launch: dict[str, Any] | None = None, **spec: Any) -> StageJob[Any]:
    root = folder / "data"
    if not root.exists():
        root.mkdir(parents=True)
        write_questions(root)
    fields = {"benchmark": "digits", "layout": "llava", "variant": None, "limit": None, "blind": True, "judge": None}
    fields |= {"options": {}}
    fields |= {"max_new_tokens": 4, "template": "llama", "precision": "fp32"}
    settings = {"launch": LAUNCH | (launch or {}), "trust": []}
    settings["location"] = {"root": str(root), "source": {"images": ""}}
    parents, work = {"model": model}, folder / "work"
    job = make_job("eval", "digits@finetune", "0" * 64, fields | spec, parents, settings, work, folder / "store")
    job.output.mkdir(parents=True, exist_ok=True)
    return job


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[StageJob[Any], dict[str, Any]]:
    job = job_of(tmp_path_factory.mktemp("plain"), model)
    return job, evaluate.run(job)


def texts(job: StageJob[Any]) -> dict[str, tuple[str, str | None]]:
    return {row["item_id"]: (row["text"], row["blind_text"]) for row in lines(job.output / "generations.jsonl")}


def test_every_question_is_answered_in_the_files_order_with_what_it_took(
    plain: tuple[StageJob[Any], dict[str, Any]],
) -> None:
    job, summary = plain
    asked = [row["question_id"] for row in lines(job.root_of(*job.locations) / "test.jsonl")]
    rows = lines(job.output / "generations.jsonl")
    assert [row["question_id"] for row in rows] == asked
    assert all(row["latency_s"] > 0 and row["prompt_tokens"] > 20 and 1 <= row["new_tokens"] <= 4 for row in rows)
    assert {row["batch"] for row in rows} <= set(range(1, 9)) and max(row["batch"] for row in rows) > 1
    assert summary["images_encoded"] == summary["images"] == 12  # each image through the tower once
    assert summary["batch_independent"] is True and summary["asked"] == 2 * len(asked)


@pytest.mark.parametrize(("orientation", "size"), [("apply", (16, 18)), ("ignore", (18, 16))])
def test_a_sources_images_are_opened_as_it_says(
    tmp_path: Path, model: Path, orientation: str, size: tuple[int, int]
) -> None:
    """A phone's picture, 18 x 16 as stored and to be turned by a quarter, behind a link to another disk."""
    root, disk = tmp_path / "data", tmp_path / "disk"
    root.mkdir()
    disk.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (18, 16)).save(disk / "phone.png", exif=exif)
    (root / "photos").symlink_to(disk)
    row = {"question_id": 1, "image": "photos/phone.png", "text": "?", "category": "c", "answer": "a", "options": 4}
    (root / "test.jsonl").write_text(json.dumps(row) + "\n")
    source = {"annotations": "test.jsonl", "orientation": orientation}
    spec = job_of(tmp_path, model, source={"file": "test.jsonl"}).spec.as_json()

    def images(follow_links: bool) -> tuple[ImageRef, ...]:
        settings = {"location": {"root": str(root), "source": source | {"follow_links": follow_links}}}
        job = make_job("eval", "e", "0" * 64, spec, {"model": model}, settings, tmp_path / "work", tmp_path / "store")
        return read_items(job)[1][0].images

    assert [open_image_ref(ref).size for ref in images(follow_links=True)] == [size]
    with pytest.raises(DataError, match="set the source's follow_links=true"):
        images(follow_links=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flash_attention_that_cannot_compute_is_refused_before_the_model_is_loaded(
    precision: str, tmp_path: Path
) -> None:
    job = job_of(tmp_path, tmp_path / "no model here", {"attention": "flash_attention_2"}, precision=precision)
    with pytest.raises(ConfigError, match=rf"launch\.attention: is flash_attention_2, .*{precision}"):
        evaluate.run(job)


@pytest.mark.parametrize(("variant", "groups"), [(None, ["5", "7", "5"]), ("vanilla", [None] * 3)])
def test_answers_of_questions_that_are_scored_as_one_name_their_group(
    variant: str | None, groups: list[str | None], tmp_path: Path, model: Path
) -> None:
    rows = [question(5, "red,blue", "A"), question(7, "cat,dog", "B"), question(1_000_005, "blue,red", "B")]
    write_tsv(tmp_path / "data/mmbench/mmbench_dev_20230712.tsv", rows)
    job = job_of(tmp_path, model, benchmark="mmbench", variant=variant)
    evaluate.run(job)
    assert [row.get("group") for row in lines(job.output / "generations.jsonl")] == groups
    assert [row.group for row in read_generations(job.output / "generations.jsonl")] == [name or "" for name in groups]


def test_scores_hold_figures_with_intervals_items_and_counts(plain: tuple[StageJob[Any], dict[str, Any]]) -> None:
    job, summary = plain
    record = json.loads((job.output / "scores.json").read_text())
    assert record["metrics"] == summary["metrics"]
    assert (record["benchmark"], record["variant"]) == ("digits", "exact-match-v1")
    asked = {
        "name": "digits-exact-match-v1",
        "asked": 60,
        "total": 60,
        "limited": False,
        "departs": ["max_new_tokens=4"],
    }
    how = {"template": "llama", "max_new_tokens": 4, "precision": "fp32", "judge": None, "code": KINDS["eval"].version}
    assert record["protocol"] == record["protocol"] | asked | how
    assert list(record["aggregate"]) == ["accuracy", "accuracy/even", "accuracy/odd"]
    assert [row["id"] for row in record["per_item"]] == [
        row["item_id"] for row in lines(job.output / "generations.jsonl")
    ]
    assert record["counts"]["scored"] == 60 and record["counts"]["missing"] == 0
    for row in record["metrics"]:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert row["chance"] == 25.0 and row["blind"] is not None


def test_batches_of_one_give_the_same_answers(
    plain: tuple[StageJob[Any], dict[str, Any]], tmp_path: Path, model: Path
) -> None:
    job = job_of(tmp_path, model, {"eval_batch": 1})
    evaluate.run(job)
    assert texts(job) == texts(plain[0])


def test_a_native_templates_turn_end_ends_answers_as_in_chat(tmp_path: Path) -> None:
    output = tmp_path / "train-0123/output"
    output.mkdir(parents=True)
    save_model(model_that_ends_turns("chatml").loaded, output / "model", None, {})
    job = job_of(tmp_path, output, template="native", max_new_tokens=12, blind=False, limit=12)
    evaluate.run(job)
    chat = tinylmm.load(output / "model", device="cpu")
    rows = lines(job.output / "generations.jsonl")
    root = job.root_of(*job.locations)
    assert min(row["new_tokens"] for row in rows) < 12
    for row in rows:
        assert chat.chat(row["prompt"], root / row["image"], max_new_tokens=12) == row["text"]


def test_a_rank_killed_while_generating_loses_nothing_and_asks_nothing_twice(
    plain: tuple[StageJob[Any], dict[str, Any]], tmp_path: Path, model: Path
) -> None:
    job = job_of(tmp_path, model, {"eval_batch": 1})
    job.write()
    path = job.folder / "answers/rank0.jsonl"
    worker = subprocess.Popen(
        [sys.executable, "-m", "tinylmm.launch.worker", str(job.folder)], env=environment(), stderr=subprocess.DEVNULL
    )
    while worker.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") >= 5):
        time.sleep(0.002)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.wait() == -signal.SIGKILL, "it ended before it was killed"
    kept = path.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    assert 5 <= whole.count(b"\n") < 120
    with path.open("ab") as file:
        file.write(b'{"mode": "image", "id": "0-red.png-0", "te')  # what a kill inside a write leaves
    summary = evaluate.run(job)
    assert path.read_bytes().startswith(whole)
    ids = Counter((row["mode"], row["id"]) for row in lines(path))
    assert len(ids) == 120 and set(ids.values()) == {1}
    assert summary["kept"] == whole.count(b"\n") and summary["asked"] == 120 - summary["kept"]
    assert texts(job) == texts(plain[0])


def test_a_stop_keeps_the_answers_and_the_next_try_goes_on(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylmm.generation import engine as generate

    job = job_of(tmp_path, model, blind=False)
    calls: list[int] = []
    monkeypatch.setattr(generate, "stop_requested", lambda: calls.append(1) or len(calls) > 12)
    with pytest.raises(StoppedError) as stopped:
        evaluate.run(job)
    assert stopped.value.exit_code == 75
    kept = len(read_answers(job.folder / "answers"))
    monkeypatch.setattr(generate, "stop_requested", lambda: False)
    assert 0 < kept < 60 and evaluate.run(job)["asked"] == 60 - kept


def test_a_limited_evaluation_draws_from_every_category_and_says_so(tmp_path: Path, model: Path) -> None:
    job = job_of(tmp_path, model, blind=False, limit=10, limit_seed=3)
    summary = evaluate.run(job)
    rows = lines(job.output / "generations.jsonl")
    assert {row["category"] for row in rows} == {"even", "odd"} and summary["questions"] == len(rows) == 10
    protocol = json.loads((job.output / "scores.json").read_text())["protocol"]
    assert (protocol["limited"], protocol["asked"], protocol["total"], protocol["seed"]) == (True, 10, 60, 3)
    assert protocol["departs"][0] == "a sample of 10 of 60 questions"


@pytest.mark.parametrize("blind", [False, True])
def test_answers_wait_unscored_for_their_judge_who_scores_them_without_the_model(
    blind: bool, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Digits, "judged", True)
    monkeypatch.setattr(Digits, "score", score_by_judge)
    job = job_of(tmp_path, model, blind=blind, limit=7)
    summary = evaluate.run(job)
    rows = lines(job.output / "generations.jsonl")
    assert summary["metrics"] == [] and len(rows) == 7 and all(row["score"] is None for row in rows)
    with judge_server(lambda body: completion("0.5")) as server:
        judge_job = judging_of(job, server.url)
        judged = judging.run(judge_job)
    assert [(row["metric"], row["value"]) for row in judged["metrics"]] == [("grade", 50.0)]
    assert judged["metrics"][0]["blind"] == (50.0 if blind else None)
    scored = lines(judge_job.output / "generations.jsonl")
    changes = {"score": 0.5, "correct": True} | ({"blind_score": 0.5, "blind_correct": True} if blind else {})
    assert scored == [row | changes for row in rows]
    record = json.loads((judge_job.output / "scores.json").read_text())
    assert (record["protocol"]["judge"], record["protocol"]["judge_runs"]) == ("judge-1", 1)
    assert record["generation"]["asked"] == summary["asked"] and record["model_digest"].startswith("train-0123")


def score_by_judge(
    self: Digits, items: Any, answers: Any, variant: str | None = None, judge: Judge | None = None
) -> Scores:
    """Whatever number the judge says."""
    if judge is None:
        rows = tuple(ItemScore(item.item_id, None) for item in items)
        return Scores("digits", "said", {}, rows, {"scored": 0, "missing": 0, "unparsed": 0, "unjudged": len(items)})
    ask = [[{"role": "user", "content": f"grade {answers[item.item_id].text}"}] for item in items]
    grades = [float(said) for said in judge.map(lambda messages: judge.ask(messages, max_tokens=3), ask)]
    rows = tuple(ItemScore(item.item_id, grade) for item, grade in zip(items, grades, strict=True))
    counts = {"scored": len(items), "missing": 0, "unparsed": 0} | judge.usage.counts()
    return Scores("digits", "said", {"grade": 100 * sum(grades) / len(grades)}, rows, counts)


def judging_of(job: StageJob[Any], url: str) -> StageJob[Any]:
    spec = job.spec.as_json() | {"judge": "judge-1"}
    settings = job.settings.as_json()
    settings["location"]["judge_url"] = url
    parents, work = job.parents | {"answers": job.output}, job.folder.parent / "judging"
    made = make_job("judge", job.name, "1" * 64, spec, parents, settings, work, job.store)
    made.output.mkdir(parents=True)
    return made


@pytest.mark.slow
def test_two_ranks_share_the_images_and_give_the_same_answers(
    plain: tuple[StageJob[Any], dict[str, Any]], tmp_path: Path, model: Path
) -> None:
    job = job_of(tmp_path, model, {"backend": "torchrun", "nproc": 2})
    job.write()
    backend = torchrun.Backend(job.settings.launch)
    backend.start(job)
    while (summary := backend.poll()) is None:
        time.sleep(0.1)
    assert summary["world_size"] == 2 and summary["images_encoded"] == 12 and summary["asked"] == 120
    assert all(len(lines(job.folder / f"answers/rank{rank}.jsonl")) == 60 for rank in (0, 1))
    assert texts(job) == texts(plain[0])


def test_shards_hold_every_entry_once_and_keep_an_image_together() -> None:
    groups = ["a", "b", "a", "c", "b", "d", "a"]
    shards = [shard(groups, rank, 3) for rank in range(3)]
    assert sorted(i for part in shards for i in part) == list(range(7))
    assert shards == [[0, 2, 5, 6], [1, 4], [3]]


def test_answers_from_several_files_are_one_and_a_broken_line_is_dropped_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        with AnswerFile(tmp_path / f"rank{number}.jsonl") as file:
            file.append([{"mode": "image", "id": f"{number}", "text": "é\u2028"}])
    (tmp_path / "rank0.jsonl").open("a").write('{"half')
    assert {key: row["text"] for key, row in read_answers(tmp_path).items()} == {
        ("image", "0"): "é\u2028",
        ("image", "1"): "é\u2028",
    }
    with AnswerFile(tmp_path / "rank0.jsonl") as file:  # the half line is gone before the next is written
        file.append([{"mode": "image", "id": "2", "text": ""}])
    assert ("image", "2") in read_answers(tmp_path)
    path = tmp_path / "rank1.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"id": "1"', b'"id": "7"'))
    assert set(read_answers(tmp_path)) == {("image", "0"), ("image", "2")}
    assert "rank1.jsonl, line 1 is damaged and dropped" in caplog.text


def test_a_flipped_bit_in_a_kept_answer_is_asked_again_and_never_scored(
    plain: tuple[StageJob[Any], dict[str, Any]], tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tinylmm.generation import engine as generate

    job = job_of(tmp_path, model)
    calls: list[int] = []
    monkeypatch.setattr(generate, "stop_requested", lambda: calls.append(1) or len(calls) > 12)
    with pytest.raises(StoppedError):
        evaluate.run(job)
    monkeypatch.setattr(generate, "stop_requested", lambda: False)
    path = job.folder / "answers/rank0.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    assert len(rows) > 3
    for number in (0, 2):
        at = rows[number].index(b'"text": "') + 9
        rows[number] = rows[number][:at] + bytes([rows[number][at] ^ 1]) + rows[number][at + 1 :]
    path.write_bytes(b"".join(rows))
    assert evaluate.run(job)["kept"] == len(rows) - 2
    assert texts(job) == texts(plain[0])
