"""Runs never share a folder, a live run's name is refused, and what a record says about a dead process is corrected."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tinylmm.errors import IntegrityError, UserError
from tinylmm.store import runs
from tinylmm.store.provenance import Process, this_process
from tinylmm.store.runs import (
    RunRecord,
    StageRow,
    check_name,
    create_run,
    read_run,
    read_runs,
    recorded_run,
    used_digests,
    write_run,
)

CREATE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tinylmm.store.runs import create_run
name = sys.argv[2] or None
sys.stdin.readline()
with ThreadPoolExecutor(25) as pool:
    folders = list(pool.map(lambda _: create_run(Path(sys.argv[1]), "base", name), range(25)))
print(*(folder.name for folder in folders), flush=True)
sys.stdin.readline()
"""


def start(root: Path, name: str = "") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CREATE, str(root), name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return process


@pytest.fixture
def live_run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process whose runs `mine`, `mine-2` ... `mine-25` are running."""
    process = start(tmp_path, "mine")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("mine")
    yield process
    process.kill()
    process.communicate()


def row(digest: str, kind: str = "train", **told: Any) -> StageRow:
    return StageRow(kind, f"name of {digest}", digest, f"{kind}-{digest}", **told)


def finish(folder: Path, **changes: Any) -> None:
    """Change run.json by hand; done unless told otherwise."""
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**content, "status": "done"} | changes))


@pytest.mark.parametrize("name", [None, "ablation"], ids=["dated", "named"])
def test_50_threads_get_50_folders(tmp_path: Path, name: str | None) -> None:
    with ThreadPoolExecutor(50) as pool:
        folders = list(pool.map(lambda _: create_run(tmp_path, "base", name), range(50)))
    assert len(set(folders)) == 50
    assert set((tmp_path / "runs").iterdir()) == set(folders)
    assert all(json.loads((folder / "run.json").read_text())["name"] == folder.name for folder in folders)


def test_two_processes_with_25_threads_each_get_50_folders(tmp_path: Path) -> None:
    names = " ".join(process.communicate("\n")[0] for process in [start(tmp_path), start(tmp_path)]).split()
    assert len(set(names)) == 50
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)


def test_a_run_without_a_name_gets_a_dated_one(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "nano-share")
    assert re.fullmatch(r"nano-share-\d{8}-\d{6}-[0-9a-f]{4}", folder.name)
    assert folder.parent == tmp_path / "runs"


def test_the_record_is_kept_and_names_its_process(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "base", overrides=["llm=phi2"])
    record = json.loads((folder / "run.json").read_text())
    assert record["overrides"] == ["llm=phi2"]
    assert vars(this_process()).items() <= record.items()
    assert record["status"] == "running"
    assert set(record["versions"]) == {"tinylmm", "git", "python", "torch", "transformers"}


def test_a_name_that_is_taken_by_a_finished_run_gets_a_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for expected in ("mine", "mine-2", "mine-3"):
        folder = create_run(tmp_path, "base", "mine")
        assert folder.name == expected
        finish(folder)
    assert "a run named mine exists; this one is mine-3" in caplog.text


def test_a_name_that_a_live_process_runs_under_is_refused_with_pid_and_host(
    tmp_path: Path, live_run: subprocess.Popen[str]
) -> None:
    with pytest.raises(
        UserError, match=rf"'mine' is still running, as process {live_run.pid} on {this_process().host}"
    ):
        create_run(tmp_path, "base", "mine")
    assert len(list((tmp_path / "runs").iterdir())) == 25


def test_a_run_of_a_killed_process_reads_as_stopped_and_frees_its_name(
    tmp_path: Path, live_run: subprocess.Popen[str]
) -> None:
    assert {run.status for run in read_runs(tmp_path)} == {"running"}
    live_run.kill()
    live_run.wait()
    assert {run.status for run in read_runs(tmp_path)} == {"stopped"}
    assert create_run(tmp_path, "base", "mine").name == "mine-26"


@pytest.mark.parametrize(
    ("changes", "status"),
    [({}, "running"), ({"process_start": 1.0}, "stopped"), ({"host": "elsewhere"}, "running")],
    ids=["this process", "pid reused", "other host"],
)
def test_running_is_judged_by_process_where_it_can_be_seen(
    tmp_path: Path, changes: dict[str, Any], status: str
) -> None:
    finish(create_run(tmp_path, "base"), status="running", **changes)
    assert read_runs(tmp_path)[0].status == status


SQUEUE = """#!/bin/sh
echo "$@" >> {asked}
echo "11 RUNNING"
echo "21 PENDING"
"""


def test_all_runs_that_slurm_makes_cost_one_question_to_its_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, program = tmp_path / "asked", tmp_path / "bin/squeue"
    program.parent.mkdir()
    program.write_text(SQUEUE.format(asked=asked))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    for number in range(5):
        jobs = {"a": f"{number}1", "b": f"{number}2"}
        finish(create_run(tmp_path, "base", f"run{number}"), status="running", jobs=jobs)
    stand = {run.name: run.status for run in read_runs(tmp_path)}
    assert stand == {f"run{number}": "running" if number in (1, 2) else "stopped" for number in range(5)}
    (line,) = asked.read_text().splitlines()
    assert "--jobs=01,02,11,12,21,22,31,32,41,42" in line
    assert recorded_run(tmp_path / "runs/run0").status == "running"  # who writes a record again asks nobody
    assert len(asked.read_text().splitlines()) == 1


@pytest.mark.parametrize("name", ["a", "Phi2_share-1.5", "-", "_x", "0", "a" * 200])
def test_plain_names_are_allowed(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "../a", "a b", "é", "a\n", "a" * 201, "a*"])
def test_other_names_are_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a run folder"):
        create_run(tmp_path / "store", "base", name)
    assert not (tmp_path / "store").exists()


def test_runs_are_listed_newest_first(tmp_path: Path) -> None:
    for day in (2, 3, 1):
        finish(create_run(tmp_path, "base", f"day{day}"), created=f"2026-01-0{day}T00:00:00+00:00")
    assert [run.name for run in read_runs(tmp_path)] == ["day3", "day2", "day1"]


def test_a_store_without_runs_lists_none(tmp_path: Path) -> None:
    assert read_runs(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "{}", '{"name":"a","status":"done","created":"x","stages":[{}]}', '{"name":1,"created":1}'],
    ids=["missing", "empty", "cut", "list", "no fields", "no digest", "wrong types"],
)
def test_an_unreadable_record_is_listed_and_stops_the_search_for_unused_stages(
    tmp_path: Path, text: str | None
) -> None:
    create_run(tmp_path, "base", "good")
    (tmp_path / "runs/bad").mkdir()
    if text is not None:
        (tmp_path / "runs/bad/run.json").write_text(text)
    assert sorted((run.name, run.status) for run in read_runs(tmp_path)) == [
        ("bad", "unreadable"),
        ("good", "running"),
    ]
    with pytest.raises(IntegrityError, match=r"bad/run\.json cannot be read"):
        used_digests(tmp_path)


def test_used_digests_are_those_of_all_runs(tmp_path: Path) -> None:
    for digests in ("ab", "bc"):
        create_run(tmp_path, "base", stages=[row(digest) for digest in digests])
    assert used_digests(tmp_path) == {"a", "b", "c"}


FILE = """{
 "format": 1,
 "name": "mine",
 "status": "running",
 "created": "2026-01-31T00:00:00.000+00:00",
 "finished": null,
 "stages": [
  {
   "kind": "train",
   "name": "name of a",
   "digest": "a",
   "key": "train-a",
   "status": "run",
   "seconds": 1.25
  }
 ],
 "versions": {
  "tinylmm": "0.1.0"
 },
 "overrides": [
  "llm=phi2",
  "data.root=é"
 ],
 "spec": {
  "seed": 0
 },
 "pid": 17,
 "host": "elsewhere",
 "boot_id": null,
 "pid_namespace": null,
 "process_start": 2.5
}"""


def test_a_record_reads_typed_and_writes_back_to_the_same_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "runs/mine"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(FILE, encoding="utf-8")
    run = read_run(folder)
    assert run == RunRecord(
        folder,
        "running",
        "2026-01-31T00:00:00.000+00:00",
        stages=(row("a", status="run", seconds=1.25),),
        versions={"tinylmm": "0.1.0"},
        overrides=("llm=phi2", "data.root=é"),
        spec={"seed": 0},
        process=Process(17, "elsewhere", None, None, 2.5),
    )
    assert (run.name, run.host, run.trainings) == ("mine", "elsewhere", run.stages)
    write_run(folder, run)
    assert (folder / "run.json").read_text(encoding="utf-8") == FILE


def test_a_new_record_has_the_fields_of_the_file_in_its_order(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "base", "mine", ["llm=phi2"], {"seed": 0}, [row("a")])
    content = json.loads((folder / "run.json").read_text())
    assert list(content) == list(json.loads(FILE)) and content["name"] == "mine"
    assert content["stages"] == [json.loads(FILE)["stages"][0] | {"status": "todo", "seconds": None}]


@pytest.mark.parametrize(
    ("status", "finished"), [("todo", False), ("running", False), ("run", True), ("reused", True), ("failed", False)]
)
def test_a_stage_is_finished_if_the_run_has_its_result(status: Any, finished: bool) -> None:
    assert row("a", status=status).finished == finished


def test_a_run_goes_by_the_name_of_its_folder(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "base", "mine").rename(tmp_path / "runs/renamed")
    assert [run.name for run in read_runs(tmp_path)] == [folder.name] == ["renamed"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": 2}, "format is 2, this version reads 1; use the version of tinylmm that wrote it"),
        ({"status": "finished"}, "status or created is not what it may be"),
        ({"stages": [{**vars(row("a")), "status": "over"}]}, "the stage 'name of a' has a field"),
        ({"stages": [{"digest": "a"}]}, "KeyError: 'kind'"),
    ],
    ids=["format", "status", "stage status", "stage fields"],
)
def test_a_record_that_says_something_else_is_refused_with_its_file(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    folder = create_run(tmp_path, "base", "mine")
    finish(folder, **changes)
    with pytest.raises(IntegrityError, match=re.escape(f"{folder / 'run.json'} cannot be read (")) as caught:
        read_run(folder)
    assert reason in str(caught.value)


def test_run_json_has_one_reader() -> None:
    source = Path(runs.__file__).parents[1]
    reads = re.compile(r"RUN_FILE\)\.read|run\.json[\"']\)?\.read|read_json\([^)]*(RUN_FILE|run\.json)")
    assert [path.name for path in source.rglob("*.py") if reads.search(path.read_text(encoding="utf-8"))] == []
