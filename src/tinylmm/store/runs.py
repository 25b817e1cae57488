"""Run folders, `store/runs/<name>`: made atomically, each with a record that always reads whole. No torch here."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from tinylmm.errors import IntegrityError, UserError
from tinylmm.store.integrity import write_atomic
from tinylmm.store.provenance import ended_with_boot, is_running, iso, now, software_versions, this_process

RUN_FILE = "run.json"
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
NAME_LENGTH = 200

Run = dict[str, Any]
"""run.json with `folder` (Path) added; `status` is running, done, failed, stopped or unreadable."""

log = logging.getLogger(__name__)


def create_run(store_root: Path, base_name: str, record: dict[str, Any]) -> Path:
    """Make the folder of a new run with its run.json in it, and return it. Never an existing folder.

    Args:
        store_root: the store.
        base_name: what the run is made of; names the folder (with date and random suffix) if the user named no other.
        record: plain JSON for run.json. A `name` in it is the user's and is taken as it is (`name-2`, `name-3` and
            so on if there are such runs already). status, created, finished, stages and versions are filled in where
            they are missing, and always what identifies this process.

    Raises:
        UserError: the name has other characters than letters, digits, `.`, `_` and `-`, or belongs to a live run; or the
            store cannot be written.
    """
    runs = Path(store_root) / "runs"
    explicit = record.get("name")
    check_name(explicit if explicit is not None else base_name)
    # Filled before it gets its name, so nobody ever meets a run folder without a record.
    draft = runs / f".{secrets.token_hex(8)}.tmp"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"store: nothing can be written to {runs.parent.absolute()} ({error.strerror}). "
            "Name a folder that you may write to with store=PATH or the environment variable TINYLMM_STORE."
        ) from error
    try:
        for name in _series(runs, explicit) if explicit is not None else _dated(base_name):
            filled = {"format": 1, "name": name, "status": "running", "created": now(), "finished": None, "stages": []}
            versions = {"versions": software_versions()}
            write_run(draft, {**filled, **versions, **record, **this_process(), "name": name})
            if _took_name(draft, runs / name):
                if name != explicit and explicit is not None:
                    log.warning("a run named %s exists; this one is %s", explicit, name)
                return runs / name
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


def write_run(folder: Path, record: dict[str, Any]) -> None:
    """Write run.json atomically; a `folder` in the record (as `read_runs` adds it) is left out."""
    kept = {key: value for key, value in record.items() if key != "folder"}
    write_atomic(folder / RUN_FILE, json.dumps(kept, indent=1, ensure_ascii=False))


def read_runs(store_root: Path) -> list[Run]:
    """Return all runs, newest first.

    A record says "running" only while its process may be alive: a dead one's reads as "stopped" (of another host's
    process nothing can be known here). A run.json that cannot be read gives a row with status "unreadable" and
    `problem`, a sentence that says why.
    """
    runs = Path(store_root) / "runs"
    folders = (
        [path for path in runs.iterdir() if path.is_dir() and not path.name.startswith(".")] if runs.is_dir() else []
    )
    return sorted(map(_read_run, folders), key=lambda run: (run["created"], run["name"]), reverse=True)


def used_digests(store_root: Path) -> set[str]:
    """Return the digests of all stages that some run refers to: what `Store.gc` has to keep.

    Raises:
        IntegrityError: a run's record cannot be read, so nobody knows what it uses.
    """
    digests: set[str] = set()
    for run in read_runs(store_root):
        if run["status"] == "unreadable":
            raise IntegrityError(
                f"{run['problem']} Which stages this run uses is unknown, so nothing is deleted. Repair the file, or "
                f"delete the folder {run['folder']} to give the run up."
            )
        digests |= {stage["digest"] for stage in run["stages"]}
    return digests


def _series(runs: Path, name: str) -> Iterator[str]:
    """Yield name, name-2, name-3 and so on; stop with an error at one that another live process works in."""
    number = 1
    while True:
        candidate = name if number == 1 else f"{name}-{number}"
        if not (runs / candidate).exists():
            yield candidate  # whoever comes back here lost it to another process: it exists now, and is looked at
            continue
        run = _read_run(runs / candidate)
        if run["status"] == "running" and run.get("pid") != os.getpid():
            raise UserError(
                f"name: the run {candidate!r} is still running, as process {run.get('pid')} on {run.get('host')} since "
                f"{run['created']}. Wait for it, stop it, or choose another name."
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


def _read_run(folder: Path) -> Run:
    path = folder / RUN_FILE
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if missing := {"name", "status", "created", "stages"} - set(run):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        if not all(isinstance(stage["digest"], str) for stage in run["stages"]) or not isinstance(run["created"], str):
            raise ValueError("a stage's digest or the time of creation is not text")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        created = iso(folder.stat().st_mtime)
        problem = f"{path} cannot be read ({reason})."
        return {
            "name": folder.name,
            "status": "unreadable",
            "created": created,
            "problem": problem,
            "stages": [],
            "folder": folder,
        }
    if run["status"] == "running" and (is_running(run) is False or ended_with_boot(run, path.stat().st_mtime)):
        run["status"] = "stopped"
    return {**run, "folder": folder}
