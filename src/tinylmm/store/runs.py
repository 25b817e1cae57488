"""Run folders, `runs/<name>` of a store: made atomically, each with a record that always reads whole. No torch here."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from filelock import FileLock

from tinylmm.errors import DiskError, IntegrityError, UserError
from tinylmm.store.disk import FULL, refusal
from tinylmm.store.integrity import write_atomic
from tinylmm.store.layout import RUN_FILE, StoreLayout
from tinylmm.store.provenance import (
    Process,
    ended_with_boot,
    is_running,
    iso,
    now,
    software_versions,
    this_process,
)
from tinylmm.store.queue import queued

RUN_FORMAT = 1
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
NAME_LENGTH = 200
T = TypeVar("T")

CLOSING = "closing"
"""Stands among a run's jobs for the one that comes after all stages."""
TRAIN = "train"
"""Kind of the stages that leave a model."""

StageStatus = Literal["todo", "running", "run", "reused", "failed"]
RunStatus = Literal["running", "done", "waiting", "failed", "stopped", "unreadable"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRow:
    """A stage as its run saw it.

    Attributes:
        kind, name, digest: as in `store/stage.py`.
        key: name of its folder.
        status: `run` if this run made it, `reused` if the store had it.
        seconds: that this run spent on it; None unless it made it.
    """

    kind: str
    name: str
    digest: str
    key: str
    status: StageStatus = "todo"
    seconds: float | None = None

    @property
    def finished(self) -> bool:
        """Whether the run has this stage's result."""
        return self.status in ("run", "reused")


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of a run.

    Attributes:
        folder: where it lies. Its name is the run's name: that is what every command finds it by.
        status: `running` only while the process may be alive; `waiting` if all that is not done waits for the user;
            `unreadable` if run.json cannot be read.
        created, finished: ISO 8601; `finished` is None as long as it is not.
        stages: in the order in which they are made.
        versions: of the software (`provenance.software_versions`).
        overrides: the words that the user gave.
        spec: the run's whole configuration, as plain JSON.
        process: what works or worked on it, or has queued it; None if the record does not say.
        jobs: digest of a stage -> the job of SLURM that makes it; and CLOSING -> the one that comes after all.
        problem: a sentence that says why run.json cannot be read; else empty.
    """

    folder: Path
    status: RunStatus
    created: str
    finished: str | None = None
    stages: tuple[StageRow, ...] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    process: Process | None = None
    jobs: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def host(self) -> str:
        """The host that the run was started on; empty if unknown."""
        return "" if self.process is None else self.process.host

    @property
    def trainings(self) -> tuple[StageRow, ...]:
        """The stages that leave a model, in their order."""
        return tuple(stage for stage in self.stages if stage.kind == TRAIN)

    def as_json(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "format": RUN_FORMAT,
            "name": self.name,
            "status": self.status,
            "created": self.created,
            "finished": self.finished,
            "stages": [dict(vars(stage)) for stage in self.stages],
            "versions": dict(self.versions),
            "overrides": list(self.overrides),
            "spec": dict(self.spec),
            **(vars(self.process) if self.process else {}),
            **({"jobs": dict(self.jobs)} if self.jobs else {}),
        }


def read_run(folder: Path) -> RunRecord:
    """Return the record of the run in `folder`, as the run stands.

    A record that says "running" reads as "stopped" if its process is gone (of another host's nothing can be known here), or
    SLURM knows none of its jobs.

    Raises:
        IntegrityError: run.json is missing, of another format, or damaged; the message names it.
    """
    run = recorded_run(folder)
    return _as_it_stands(run, queued(run.jobs.values()) if run.status == "running" and run.jobs else {})


def recorded_run(folder: Path) -> RunRecord:
    """Return what run.json says, the one reader of it; for who writes it again, or knows how the run stands.

    Raises:
        IntegrityError: it is missing, of another format, or damaged; the message names it.
    """
    path = folder / RUN_FILE
    try:
        return _parsed(folder, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path, error) from error


def read_all(folders: Iterable[Path]) -> list[RunRecord]:
    """`read_run` of each, with one question to SLURM; what cannot be read has status "unreadable" and a `problem`."""
    runs = [_or_problem(recorded_run, folder, folder) for folder in folders]
    jobs = [job for run in runs if run.status == "running" for job in run.jobs.values()]
    states = queued(jobs) if jobs else {}
    return [_or_problem(partial(_as_it_stands, states=states), run, run.folder) for run in runs]


def _as_it_stands(run: RunRecord, states: Mapping[str, str] | None) -> RunRecord:
    """What is left of a record that says "running"; `states` as of `queued`."""
    if run.status != "running":
        return run
    if run.jobs:
        gone = states is not None and states.keys().isdisjoint(run.jobs.values())
    else:
        try:
            gone = run.process is not None and _has_ended(run.process, run.folder / RUN_FILE)
        except OSError as error:
            raise _unreadable(run.folder / RUN_FILE, error) from error
    return replace(run, status="stopped") if gone else run


def _has_ended(process: Process, record: Path) -> bool:
    """Whether it is known that a process is gone."""
    return is_running(process) is False or ended_with_boot(process, record.stat().st_mtime)


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    reason = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
    return IntegrityError(f"{path} cannot be read ({reason}).")


def _or_problem(read: Callable[[T], RunRecord], what: T, folder: Path) -> RunRecord:
    try:
        return read(what)
    except IntegrityError as error:
        return RunRecord(folder, "unreadable", iso(folder.stat().st_mtime), problem=str(error))


def run_lock(folder: Path) -> FileLock:
    """To be held by whoever reads a record and writes it again, where several do."""
    return FileLock(folder / ".lock", mode=0o666)


def _parsed(folder: Path, content: Mapping[str, Any]) -> RunRecord:
    """The typed record of run.json's content."""
    if (found := content.get("format")) != RUN_FORMAT:
        raise ValueError(
            f"format is {found!r}, this version reads {RUN_FORMAT}; use the version of tinylmm that wrote it"
        )
    if content["status"] not in get_args(RunStatus) or not isinstance(content["created"], str):
        raise ValueError("status or created is not what it may be")
    return RunRecord(
        folder,
        content["status"],
        content["created"],
        content.get("finished"),
        tuple(map(_parsed_row, content["stages"])),
        content.get("versions") or {},
        tuple(content.get("overrides") or ()),
        content.get("spec") or {},
        _parsed_process(content),
        content.get("jobs") or {},
    )


def _parsed_process(content: Mapping[str, Any]) -> Process | None:
    names = [one.name for one in fields(Process)]
    return Process(**{name: content[name] for name in names}) if content.keys() >= set(names) else None


def _parsed_row(content: Mapping[str, Any]) -> StageRow:
    names = {key: content[key] for key in ("kind", "name", "digest", "key")}
    status = content.get("status", "todo")
    if not all(isinstance(name, str) for name in names.values()) or status not in get_args(StageStatus):
        raise ValueError(f"the stage {names['name']!r} has a field that is not what it may be")
    return StageRow(**names, status=cast(StageStatus, status), seconds=content.get("seconds"))


def create_run(
    store_root: Path,
    base_name: str,
    name: str | None = None,
    overrides: Sequence[str] = (),
    spec: Mapping[str, Any] | None = None,
    stages: Sequence[StageRow] = (),
) -> Path:
    """Make the folder of a new run with its run.json in it, and return it. Never an existing folder.

    Args:
        store_root: the store.
        base_name: what the run is made of; names the folder (with date and random suffix) if the user named no other.
        name: the user's, taken as it is; `name-2`, `name-3` and so on if there are such runs already.
        overrides, spec, stages: as in `RunRecord`.

    Raises:
        UserError: the name has other characters than letters, digits, `.`, `_` and `-`, or belongs to a live run; or the
            store cannot be written.
        DiskError: its disk is full.
    """
    runs = StoreLayout(Path(store_root)).runs
    check_name(base_name if name is None else name)
    # Filled before it gets its name, so nobody ever meets a run folder without a record.
    draft = runs / f".{secrets.token_hex(8)}.tmp"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        if error.errno in FULL and (said := refusal(error, runs)) is not None:
            raise DiskError(said) from error
        raise UserError(
            f"store: nothing can be written to {runs.parent.absolute()} ({error.strerror}). "
            "Name a folder that you may write to with store=PATH or the environment variable TINYLMM_STORE."
        ) from error
    record = RunRecord(
        draft,
        "running",
        now(),
        stages=tuple(stages),
        versions=software_versions(),
        overrides=tuple(overrides),
        spec=spec or {},
        process=this_process(),
    )
    try:
        for candidate in _dated(base_name) if name is None else _series(runs, name):
            folder = runs / candidate
            write_run(draft, replace(record, folder=folder))
            if _took_name(draft, folder):
                if name not in (None, candidate):
                    log.warning("a run named %s exists; this one is %s", name, candidate)
                return folder
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    raise AssertionError("both series of names are endless")


def check_name(name: str) -> None:
    """Refuse a run name that is not a plain folder name.

    Raises:
        UserError: other characters than letters, digits, `.`, `_` and `-`, a dot in front, nothing, or too long.
    """
    if NAME_PATTERN.fullmatch(name) is None or len(name) > NAME_LENGTH:
        raise UserError(
            f"name: {name!r} cannot name a run folder. Allowed are 1 to {NAME_LENGTH} letters, digits, '.', '_' and "
            "'-', not beginning with a dot. Choose another name."
        )


def write_run(folder: Path, record: RunRecord) -> None:
    """Write run.json into a folder, atomically."""
    write_atomic(folder / RUN_FILE, json.dumps(record.as_json(), indent=1, ensure_ascii=False))


def read_runs(store_root: Path) -> list[RunRecord]:
    """Return all runs, newest first; one whose run.json cannot be read has status "unreadable" and a `problem`."""
    runs = StoreLayout(Path(store_root)).runs
    folders = [path for path in runs.iterdir() if path.is_dir() and path.name[0] != "."] if runs.is_dir() else []
    return sorted(read_all(folders), key=lambda run: (run.created, run.name), reverse=True)


def describe(run: RunRecord) -> str:
    """Return `process 17 on host`, who works or worked on a run."""
    return f"process {run.process.pid if run.process else '?'} on {run.host or '?'}"


def used_digests(store_root: Path) -> set[str]:
    """Return the digests of all stages that some run refers to: what `Store.gc` has to keep.

    Raises:
        IntegrityError: a run's record cannot be read, so nobody knows what it uses.
    """
    digests: set[str] = set()
    for run in read_runs(store_root):
        if run.status == "unreadable":
            raise IntegrityError(
                f"{run.problem} Which stages this run uses is unknown, so nothing is deleted. Repair the file, or "
                f"delete the folder {run.folder} to give the run up."
            )
        digests |= {stage.digest for stage in run.stages}
    return digests


def _series(runs: Path, name: str) -> Iterator[str]:
    """Yield name, name-2, name-3 and so on; stop with an error at one that another live process works in."""
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        if not (runs / candidate).exists():
            yield candidate  # whoever comes back here lost it to another process: it exists now, and is looked at
            continue
        run = _or_problem(read_run, runs / candidate, runs / candidate)
        if run.status == "running" and (run.process is None or run.process.pid != os.getpid()):
            raise UserError(
                f"name: the run {candidate!r} is still running, as {describe(run)} since "
                f"{run.created}. Wait for it, stop it, or choose another name."
            )
        number += 1


def _dated(base_name: str) -> Iterator[str]:
    while True:
        yield f"{base_name}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _took_name(draft: Path, folder: Path) -> bool:
    """Rename a filled folder; False if the name is taken (a folder that is not empty is never renamed over)."""
    try:
        draft.rename(folder)
    except OSError:
        if folder.exists():
            return False
        raise
    return True
