"""`tinylmm score` end to end: benchmark folder and answer file in, figures and per-item scores out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.benchmarks.qa_folders import (
    answer_rows,
    gqa_folder,
    mme_folder,
    pope_folder,
    textvqa_folder,
    vqav2_folder,
    write_json,
    write_jsonl,
    write_parquet,
)
from tinylmm.cli.main import main
from tinylmm.evaluation.benchmarks.registry import get_benchmark

FOLDERS = {
    "vqav2": lambda folder: vqav2_folder(folder, [["yes"] * 10, ["two"] * 3 + ["3"] * 7]),
    "gqa": gqa_folder,
    "textvqa": textvqa_folder,
    "pope": pope_folder,
    "mme": mme_folder,
}


class Command:
    """Runs `tinylmm score` in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.monkeypatch, self.capsys = folder, monkeypatch, capsys

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        self.monkeypatch.setattr(sys, "argv", ["tinylmm", "score", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = self.capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    def score(self, name: str, rows: list[dict[str, Any]], *words: str) -> dict[str, Any]:
        """The JSON of a run that must succeed."""
        answers, out = write_jsonl(self.folder / "answers.jsonl", rows), self.folder / "out/scores.json"
        code, _, err = self.run(
            name, "--answers", str(answers), "--root", str(self.folder / "eval"), "--json", str(out), *words
        )
        assert code == 0, err
        return json.loads(out.read_text())


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capsys)


def items_of(name: str, root: Path) -> list[Any]:
    return get_benchmark(name).load(root)


@pytest.mark.parametrize("name", FOLDERS)
def test_the_json_keeps_its_contract_whatever_the_answers(name: str, command: Command) -> None:
    folder = FOLDERS[name](command.folder / "eval")
    items = items_of(name, folder)
    perfect = answer_rows(items, [str(getattr(item.reference, "answer", item.reference)) for item in items])
    cases = {
        "given": perfect,
        "all equal": answer_rows(items, ["no"] * len(items)),
        "empty": answer_rows(items, [""] * len(items)),
        "duplicate": perfect + perfect[:1],
        "one": perfect[:1],
        "none": [],
    }
    for case, rows in cases.items():
        record = command.score(name, rows)
        assert list(record) == ["benchmark", "variant", "aggregate", "per_item", "counts"]
        assert record["benchmark"] == name
        assert [row["id"] for row in record["per_item"]] == [item.question_id for item in items], case
        assert all(set(row) == {"id", "score", "parsed"} for row in record["per_item"])
        assert next(iter(record["aggregate"])) == get_benchmark(name).headline
        counts = record["counts"]
        assert {"scored", "missing", "unparsed"} <= set(counts)
        assert counts["missing"] == len(items) - min(len(rows), len(items))
        assert counts.get("duplicate", 0) == (1 if case == "duplicate" else 0)


def test_the_last_of_two_answers_counts_and_it_is_said(command: Command) -> None:
    items = items_of("pope", pope_folder(command.folder / "eval", {"random": ("yes",)}))
    rows = answer_rows(items, ["No"]) + answer_rows(items, ["Yes"])
    answers = write_jsonl(command.folder / "a.jsonl", rows)
    code, out, err = command.run("pope", "--answers", str(answers), "--root", str(command.folder / "eval"))
    assert code == 0
    assert "f1 (headline)" in out and "100.00" in out and "duplicate 1" in out
    assert "1 answers repeat another's question; the last of each counts" in err


def test_a_variant_is_chosen_and_named(command: Command) -> None:
    items = items_of("vqav2", FOLDERS["vqav2"](command.folder / "eval"))
    rows = answer_rows(items, ["Yes", "2"])
    assert command.score("vqav2", rows)["aggregate"]["accuracy"] == 45.0
    record = command.score("vqav2", rows, "--variant", "lmms")
    assert (record["variant"], record["aggregate"]["accuracy"]) == ("lmms", 95.0)


def test_the_folder_around_works_and_a_submission_is_written(command: Command) -> None:
    folder = command.folder / "eval/vqav2"
    for split in ("test-dev", "test"):
        rows = [{"question_id": 5, "image": "a.jpg", "text": "Q?"}]
        write_jsonl(folder / f"llava_vqav2_mscoco_{split}2015.jsonl", rows)
    upload = command.folder / "up/load.json"
    record = command.score("vqav2", [{"question_id": 5, "text": "Two."}], "--submission", str(upload))
    assert record["aggregate"] == {} and record["counts"]["hidden"] == 1
    assert json.loads(upload.read_text()) == [{"question_id": 5, "answer": "2"}]


def test_parquet_files_are_found_out(command: Command) -> None:
    rows = [{"question_id": "1", "question": "Is it?", "answer": "yes", "category": "random"}]
    write_parquet(command.folder / "eval/data/test-00000-of-00001.parquet", rows)
    given = [{"question_id": "1", "text": "Yes"}]
    assert command.score("pope", given)["aggregate"]["f1"] == 100.0
    assert command.score("pope", given, "--layout", "hf")["aggregate"]["f1"] == 100.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["popee"], "Did you mean 'pope'?"),
        (["pope", "--variant", "lmm"], "Did you mean 'lmms'?"),
        (["pope", "--layout", "parquet"], "Allowed: auto, llava, hf."),
        (["vqav2", "--split", "dev"], "vqav2 has no split 'dev'. Allowed: val, test-dev, test."),
        (["pope", "--judge-url", "http://localhost:1"], "a judge needs both"),
        (["gqa"], "testdev_balanced_questions.json not found; looked for"),
        (["pope", "--submission", "x.json"], "pope has no upload file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_use_exits_2_with_one_message(command: Command, words: list[str], message: str) -> None:
    pope_folder(command.folder / "eval")
    answers = write_jsonl(command.folder / "a.jsonl", [])
    code, _, err = command.run(*words, "--answers", str(answers), "--root", str(command.folder / "eval"))
    assert code == 2
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question_id": 99, "text": "a"}', "question_id 99: no such question among the 7"),
        ('{"question_id": 1}', "line 1: field text missing"),
        ('{"question_id": 1, "text": "a"', "line 1: not valid JSON"),
        ("{}", "line 1: field question_id, text missing"),
    ],
)
def test_bad_answers_exit_2_and_name_the_line(command: Command, content: str, message: str) -> None:
    pope_folder(command.folder / "eval")
    path = command.folder / "a.jsonl"
    path.write_text(content, encoding="utf-8")
    code, _, err = command.run("pope", "--answers", str(path), "--root", str(command.folder / "eval"))
    assert code == 2
    assert message in err and len(err.splitlines()) == 1


def test_a_judge_of_a_benchmark_that_asks_none_is_refused(command: Command) -> None:
    pope_folder(command.folder / "eval")
    answers = write_jsonl(command.folder / "a.jsonl", [])
    words = ["--answers", str(answers), "--root", str(command.folder / "eval")]
    code, _, err = command.run("pope", *words, "--judge-url", "http://localhost:1/v1", "--judge-model", "m")
    assert code == 2 and "pope is scored by rules alone" in err


def test_an_empty_question_file_is_refused(command: Command) -> None:
    write_json(command.folder / "eval/testdev_balanced_questions.json", {})
    answers = write_jsonl(command.folder / "a.jsonl", [])
    code, _, err = command.run("gqa", "--answers", str(answers), "--root", str(command.folder / "eval"))
    assert (code, "has no question" in err) == (2, True)


def test_scoring_loads_no_torch(tmp_path: Path) -> None:
    for name, make in FOLDERS.items():
        make(tmp_path / name)
    answers = write_jsonl(tmp_path / "a.jsonl", [])
    code = (
        "import sys\nfrom tinylmm.cli.main import app\n"
        f"for name, root in {[(name, str(tmp_path / name)) for name in FOLDERS]!r}:\n"
        f"    app(['score', name, '--answers', {str(answers)!r}, '--root', root], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules), 'torch was loaded'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
