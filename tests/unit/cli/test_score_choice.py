"""`tinylmm score` on multiple-choice, judged and video benchmarks, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openpyxl import load_workbook
from typer.testing import CliRunner

from tests.unit.evaluation.benchmarks.disk import write_json, write_jsonl, write_parquet
from tests.unit.evaluation.judge_server import completion, judge_server
from tinylmm.cli.main import app
from tinylmm.errors import ConfigError
from tinylmm.evaluation.judge import JudgeError

CHOICE = {"question_type": "multiple-choice", "all_choices": ["A", "B"], "index2ans": {"A": "red", "B": "blue"}}
MMMU_ID = "validation_Math_1"
SEED_QUESTION = {
    "question_id": "7",
    "question": "?",
    **{f"choice_{letter}": letter for letter in "abcd"},
    "answer": "A",
    "data_type": "image",
    "question_type_id": 1,
}
VIDEO_QUESTION = {"video": "v.mp4", "question": "?", "candidates": ["1", "2"], "answer": "1"}
MME_ROW = {"videoID": "v", "question_id": "1-1", "question": "?", "options": ["A. x.", "B. y."], "answer": "A"}


def files(root: Path) -> None:
    """The smallest official files of each benchmark, each in its folder."""
    turns = [{"from": "human", "value": "<image>\n?\nA. x\nB. y"}, {"from": "gpt", "value": "A"}]
    write_json(root / "scienceqa/llava_test_CQM-A.json", [{"id": "3", "conversations": turns, "image": "3/image.png"}])
    write_json(root / "MMMU/anns_for_eval.json", [{"id": MMMU_ID, "prompt": "?", "image": "a.png", **CHOICE}])
    gold = {"question_type": "multiple-choice", "ground_truth": "A"}
    write_json(root / "MMMU/answer_dict_val.json", {MMMU_ID: gold})
    tsv = "index\tquestion\tA\tB\tanswer\timage\n4\t?\tx\ty\tA\taGk=\n"
    (root / "mmbench").mkdir()
    (root / "mmbench/mmbench_dev_20230712.tsv").write_text(tsv)
    write_json(root / "seed_bench/SEED-Bench.json", {"questions": [SEED_QUESTION], "question_type": {"Scenes": 1}})
    write_json(root / "MVBench/json/action_count.json", [VIDEO_QUESTION])
    write_parquet(root / "Video-MME/videomme/test-00000-of-00001.parquet", [MME_ROW | {"duration": "short"}])


@pytest.mark.parametrize(
    ("benchmark", "folder", "question_id", "headline"),
    [
        ("sqa", "scienceqa", "3", "img_accuracy"),
        ("mmmu", "MMMU", MMMU_ID, "overall"),
        ("mmbench", "mmbench", 4, "accuracy"),
        ("seed", "seed_bench", "7", "image"),
        ("mvbench", "MVBench", "action_count/0", "average"),
        ("videomme", "Video-MME", "1-1", "overall"),
    ],
)
def test_an_answer_file_is_scored_from_either_folder(
    tmp_path: Path, benchmark: str, folder: str, question_id: Any, headline: str
) -> None:
    files(tmp_path / "eval")
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"question_id": question_id, "prompt": "?", "text": "A"}])
    for root in (tmp_path / "eval", tmp_path / "eval" / folder):
        command = [
            "score",
            benchmark,
            "--answers",
            str(answers),
            "--root",
            str(root),
            "--json",
            str(tmp_path / "o.json"),
        ]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0
        written = json.loads((tmp_path / "o.json").read_text())
        assert next(iter(written["aggregate"].items())) == (headline, 100.0)
        assert written["per_item"] == [{"id": question_id, "score": 1.0, "parsed": "A"}]
        assert (written["counts"]["scored"], written["counts"]["missing"], written["counts"]["unparsed"]) == (1, 0, 0)


def test_a_judged_benchmark_is_kept_now_and_finished_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINYLMM_JUDGE_API_KEY", "sk-secret")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    question = {"imagename": "v1_0.png", "question": "Who?", "answer": "Ann", "capability": ["rec"]}
    write_json(tmp_path / "mm-vet/mm-vet.json", {"v1_0": question})
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"question_id": 0, "text": "Ann"}])
    command = ["score", "mmvet", "--answers", str(answers), "--root", str(tmp_path)]
    command += ["--json", str(tmp_path / "o.json"), "--submission", str(tmp_path / "up.json")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "unjudged 1" in result.output
    assert json.loads((tmp_path / "up.json").read_text()) == {"v1_0": "Ann"}
    with judge_server(lambda body: completion("0.9")) as server:
        judged = [*command, "--judge-url", server.url, "--judge-model", "gpt-4-0613"]
        assert CliRunner().invoke(app, judged, catch_exceptions=False).exit_code == 0
        assert CliRunner().invoke(app, judged, catch_exceptions=False).exit_code == 0
    assert len(server.requests) == 1  # the second time the cache answers
    written = json.loads((tmp_path / "o.json").read_text())
    assert written["aggregate"]["total"] == 90.0 and written["counts"]["judge_cached"] == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"sk-secret" in path.read_bytes()]


def test_a_judge_that_refuses_is_the_users_to_correct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    question = {"imagename": "v1_0.png", "question": "Who?", "answer": "Ann", "capability": ["rec"]}
    write_json(tmp_path / "mm-vet/mm-vet.json", {"v1_0": question})
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"question_id": 0, "text": "Ann"}])
    command = ["score", "mmvet", "--answers", str(answers), "--root", str(tmp_path), "--judge-model", "m"]
    with judge_server(lambda body: (401, {}, b"who are you")) as server, pytest.raises(ConfigError, match="HTTP 401"):
        CliRunner().invoke(app, [*command, "--judge-url", server.url], catch_exceptions=False)
    assert ConfigError.exit_code == 2 and JudgeError.exit_code == 1


def test_the_workbook_for_mmbenchs_server_is_written_beside_the_figures(tmp_path: Path) -> None:
    files(tmp_path)
    answers = write_jsonl(tmp_path / "answers.jsonl", [{"question_id": 4, "text": "A"}])
    command = ["score", "mmbench", "--answers", str(answers), "--root", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, "--submission", str(tmp_path / "out/up.xlsx")], catch_exceptions=False)
    assert result.exit_code == 0
    rows = list(load_workbook(tmp_path / "out/up.xlsx").active.iter_rows(values_only=True))
    assert rows[1][:4] == (4, "?", "x", "y") and rows[1][6] == "A"
