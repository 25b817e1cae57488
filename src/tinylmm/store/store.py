"""The content-addressed store: finished stages by digest, each either whole and proven or not there. No torch here.

    stages/<key>    finished: spec.json, manifest.json, log.txt, metrics.jsonl, output/, and COMPLETE, written last
    work/<key>      unfinished: the same without a manifest, with checkpoints/, job.json and, after a failure, error.txt
    damaged/<key>-n what was set aside because it did not match its manifest; never used, kept for people to look at
    claims/, runs/  see claims.py and runs.py
    trash/          about to be deleted

A stage is worked on under its claim:

    with claim(store.root, stage.key):
        if not store.recover(stage):
            work = store.begin(stage)
            ...
            store.publish(stage, summary, started)
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from itertools import count
from pathlib import Path
from typing import Any, Literal

from tinylmm.errors import IntegrityError, printable
from tinylmm.store.claims import held
from tinylmm.store.gc import StoredFolder, Unused, collect_garbage, discard, list_stored, remove
from tinylmm.store.integrity import (
    MANIFEST_FILE,
    MARKER_FILE,
    OUTPUT_FOLDER,
    check_files,
    check_folder,
    mark_complete,
    read_manifest,
    sync_path,
    write_atomic,
    write_manifest,
)
from tinylmm.store.layout import CHECKPOINT_FOLDER, ERROR_FILE, JOB_FILE, LOG_FILE, SPEC_FILE, StoreLayout
from tinylmm.store.pixels import check_shelf
from tinylmm.store.provenance import iso, peak_rss_mib, software_versions
from tinylmm.store.stage import Stage, difference

NOT_PUBLISHED = (CHECKPOINT_FOLDER, JOB_FILE, ERROR_FILE)
NOT_IN_MANIFEST = (*NOT_PUBLISHED, LOG_FILE)
"""log.txt is published but not proven: lines are still written to it while the stage is being published."""

log = logging.getLogger(__name__)


class Store:
    """Finished and unfinished stages under one folder. Nothing is created on disk before the first write.

    Reading needs no claim. `begin`, `publish`, `fail` and `recover` need the stage's claim.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()
        self.layout = StoreLayout(self.root)
        self._verified: set[str] = set()

    def folder(self, stage: Stage) -> Path:
        """Where the finished stage lies, or will lie."""
        return self.layout.stage(stage.key)

    def work_folder(self, stage: Stage) -> Path:
        """Where the stage is worked on."""
        return self.layout.work_on(stage.key)

    # ------------------------------------------------------------------------------------------------ reading

    def is_complete(self, stage: Stage) -> bool:
        """Whether the stage can be reused: marked, manifest as marked, all files there with their sizes.

        A folder that fails this is not complete, and a warning says why. One that lacks only its marker (killed between
        rename and marker) is checked in full, and marked if every file is right.
        """
        folder = self.folder(stage)
        if not folder.is_dir():
            return False
        if not (folder / MARKER_FILE).exists():
            return self._mark_if_whole(stage)
        problems = check_folder(folder, deep=False) or _digest_problems(folder, stage)
        for problem in problems:
            log.warning("%s is not used: %s", stage.key, problem)
        return not problems

    def status(self, stage: Stage) -> Literal["complete", "todo"]:
        """Whether a run would reuse the stage or work on it."""
        return "complete" if self.is_complete(stage) else "todo"

    def verify(self, stage: Stage | Path, deep: bool = True) -> list[str]:
        """Return what is wrong with a finished stage, or a folder of the store, one sentence a finding, naming the file."""
        folder = stage if isinstance(stage, Path) else self.folder(stage)
        return check_shelf(folder, deep) if folder.parent == self.layout.pixels else check_folder(folder, deep)

    def stage_at(self, folder: Path) -> Stage | None:
        """The finished stage in a folder of this store, without its settings; None where it is no such folder.

        Raises:
            IntegrityError: its spec cannot be read.
        """
        if folder.resolve().parent != self.layout.stages.resolve() or not (folder / MARKER_FILE).exists():
            return None
        path = folder / SPEC_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            name = read_manifest(folder)["name"]
            return Stage.of(fields["kind"], name, fields["version"], fields["spec"], fields["parents"], {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}).") from error

    def check_spec(self, stage: Stage) -> None:
        """Compare the finished stage's spec.json with what is asked for.

        Raises:
            IntegrityError: they differ although the digest is the same; the message lists the differences.
        """
        path = self.folder(stage) / SPEC_FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            asked = stage.identity
            stored = {key: stored.get(key) for key in asked}
        except (OSError, ValueError, AttributeError) as error:
            raise IntegrityError(f"{path} cannot be read ({error}).") from error
        if lines := difference(stored, asked):
            raise IntegrityError(
                f"{path} is not what this run asks for, although the digest is the same (stored -> asked):\n  "
                + "\n  ".join(lines)
                + f"\nMove {self.folder(stage)} away and give the same command again."
            )

    def output(self, stage: Stage) -> Path:
        """Return the output folder of a complete stage.

        Raises:
            IntegrityError: the stage is not complete.
        """
        if not self.is_complete(stage):
            raise IntegrityError(
                f"{stage.name}: {self.folder(stage)} is missing or not whole. Give the run's command again."
            )
        return self.folder(stage) / OUTPUT_FOLDER

    def open_output(self, stage: Stage) -> Path:
        """Return `output(stage)` for reading, after checking every file's SHA-256, once for each Store object.

        A stage found damaged loses its marker, so the next run makes it anew.

        Raises:
            IntegrityError: a file is missing, altered or was added, or spec.json differs; each is named.
        """
        output = self.output(stage)
        if stage.digest in self._verified:
            return output
        folder = self.folder(stage)
        if problems := check_folder(folder, deep=True):
            advice = "Move what was added out of the folder"
            if check_files(folder, deep=True):
                (folder / MARKER_FILE).unlink(missing_ok=True)
                advice = "It is not used any more and will be made anew"
            raise IntegrityError(
                f"The stored stage {stage.key} ({stage.name}) differs from its manifest:\n  "
                + "\n  ".join(problems)
                + f"\n{advice}: give the same command again."
            )
        self.check_spec(stage)
        self._verified.add(stage.digest)
        return output

    # ------------------------------------------------------------------------------------------------ working

    def recover(self, stage: Stage) -> bool:
        """Finish what a killed publish left, set aside what is damaged; return whether the stage is complete now.

        To be called under the stage's claim, before `begin`.
        """
        if self.is_complete(stage):
            return True
        if self.folder(stage).exists():
            self._set_aside(self.folder(stage))
        work = self.work_folder(stage)
        if (work / MANIFEST_FILE).exists() and not (check_files(work, deep=True) or _digest_problems(work, stage)):
            log.info("%s had been finished when its process was killed; it is published now", stage.key)
            self._promote(stage)
            return True
        return False

    def begin(self, stage: Stage) -> Path:
        """Make the work folder with spec.json and output/, and return it. What an earlier, killed try left stays."""
        if self.folder(stage).exists() and not self.is_complete(stage):
            self._set_aside(self.folder(stage))
        work = self.work_folder(stage)
        (work / OUTPUT_FOLDER).mkdir(parents=True, exist_ok=True)
        (work / MANIFEST_FILE).unlink(missing_ok=True)  # what it describes is about to change
        spec = {**stage.identity, "digest": stage.digest, "settings": stage.settings}
        write_atomic(work / SPEC_FILE, json.dumps(spec, indent=1, ensure_ascii=False))
        return work

    def publish(self, stage: Stage, summary: dict[str, Any], started: float, peak_mib: float | None = None) -> Path:
        """Turn the work folder into the finished stage and return that folder. Killed anywhere, `recover` finishes it.

        Args:
            stage: the stage; its result lies in the work folder's output/.
            summary: what the stage reports about itself; plain JSON.
            started: when work began, in seconds since the epoch.
            peak_mib: the most memory that it took, where another process did it.

        Raises:
            IntegrityError: the work folder holds something else than regular files.
            TinyLMMError: the disk is full; the work folder is kept.
        """
        finished = time.time()
        record = {
            "format": 1,
            "kind": stage.kind,
            "name": stage.name,
            "digest": stage.digest,
            "parents": stage.parents,
            "summary": summary,
            "started": iso(started),
            "finished": iso(finished),
            "seconds": round(finished - started, 3),
            "versions": software_versions(),
            "host": socket.gethostname(),
            "peak_rss_mib": peak_rss_mib() if peak_mib is None else peak_mib,
        }
        write_manifest(self.work_folder(stage), record, skip=NOT_IN_MANIFEST)
        return self._promote(stage)

    def fail(self, stage: Stage, error_text: str) -> None:
        """Keep the traceback of a failed try beside its log and checkpoints, for people and for the next try."""
        work = self.work_folder(stage)
        work.mkdir(parents=True, exist_ok=True)
        write_atomic(work / ERROR_FILE, printable(error_text))

    def _promote(self, stage: Stage) -> Path:
        """Move a work folder with a manifest to its final place and mark it."""
        work, folder = self.work_folder(stage), self.folder(stage)
        # Checkpoints go only now that the manifest is on disk: a kill in between loses no finished work.
        for name in NOT_PUBLISHED:
            remove(work / name)
        if folder.exists() and self.is_complete(stage):
            log.warning("%s was finished by another process meanwhile; this result is dropped", stage.key)
            discard(self.root, work)
            return folder
        if folder.exists():
            self._set_aside(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        work.rename(folder)
        sync_path(folder.parent)
        sync_path(work.parent)
        mark_complete(folder)
        return folder

    def _mark_if_whole(self, stage: Stage) -> bool:
        folder = self.folder(stage)
        owner = held(self.root, stage.key)
        if owner is not None and owner.pid != os.getpid():
            return False  # its publisher is about to mark it
        problems = check_files(folder, deep=True) or _digest_problems(folder, stage)
        for problem in problems:
            log.warning("%s is not used, it has no %s: %s", stage.key, MARKER_FILE, problem)
        if not problems:
            log.info("%s is whole and only lacked its %s", stage.key, MARKER_FILE)
            mark_complete(folder)
        return not problems

    def _set_aside(self, folder: Path) -> None:
        for number in count(1):
            target = self.layout.damaged / f"{folder.name}-{number}"
            if not target.exists():
                break
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        log.warning("%s was damaged and is set aside in %s; it is made anew", folder.name, target)

    # ------------------------------------------------------------------------------------------- listing, deleting

    def ls(self) -> list[StoredFolder]:
        """Return one row for each stage, folder of features, and the cache; see `store/gc.py`."""
        return list_stored(self.root)

    def gc(self, keep: set[str], dry_run: bool = True) -> list[Unused]:
        """Delete what no run uses, and return what that is; see `gc.collect_garbage`."""
        return collect_garbage(self.root, keep, dry_run)


def _digest_problems(folder: Path, stage: Stage) -> list[str]:
    found = read_manifest(folder).get("digest")
    return [] if found == stage.digest else [f"{folder / MANIFEST_FILE} is that of another stage, {found}."]
