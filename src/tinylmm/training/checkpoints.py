"""Crash-safe checkpoints of a training stage, published by us over transformers' (which writes in place, unchecked).

A checkpoint is written to a staging folder, hashed, synced, renamed by rank 0 after a barrier, and only then are older ones
rotated out. Reading takes the newest one whose every SHA-256 holds; a bad one is set aside by name, never deleted.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from tinylmm.store import integrity

log = logging.getLogger(__name__)

PREFIX = "checkpoint-"


class CheckpointFolder:
    """The `checkpoints/` folder of one stage.

    Args:
        root: the folder.
        keep: how many published checkpoints are kept, at least 2: the newest may turn out damaged.
        identity: what a checkpoint must have been written by to be resumed (stage digest, world size, ...).
    """

    def __init__(self, root: Path, keep: int, identity: dict[str, Any]) -> None:
        self.root = root
        self.keep = keep
        self.identity = identity

    def staging(self) -> Path:
        """Where the next checkpoint is written before it counts."""
        return self.root / "staging"

    def clear_staging(self) -> None:
        """Remove what a killed save left behind. Rank 0 only."""
        shutil.rmtree(self.staging(), ignore_errors=True)
        self.staging().mkdir(parents=True)

    def publish(self, step: int) -> Path:
        """Make the staged checkpoint of `step` count, then rotate. Rank 0 only, after every rank has written its files."""
        staged = self.staging() / f"{PREFIX}{step}"
        final = self.root / f"{PREFIX}{step}"
        integrity.write_manifest(staged, {"format": 1, "step": step, **self.identity})
        integrity.mark_complete(staged)
        if final.exists():  # the same step was saved before a kill and done again: never without one of the two
            final.rename(self._free_name(f"replaced-{final.name}"))
        staged.rename(final)
        integrity.sync_path(self.root)
        for replaced in self.root.glob("replaced-*"):
            shutil.rmtree(replaced)
        for _, old in self.published()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def published(self) -> list[tuple[int, Path]]:
        """(step, folder) of the published checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        found = [p for p in self.root.iterdir() if p.name.startswith(PREFIX) and p.name[len(PREFIX) :].isdigit()]
        return sorted((int(p.name[len(PREFIX) :]), p) for p in found)

    def newest_valid(self) -> Path | None:
        """Return the newest checkpoint whose files are all there and unaltered; set damaged ones aside. Rank 0 only."""
        for step, folder in reversed(self.published()):
            problems = integrity.check_folder(folder)
            if not problems:
                other = {k: v for k, v in self.identity.items() if integrity.read_manifest(folder).get(k) != v}
                if not other:
                    return folder
                problems = [f"it was written with another {', '.join(other)} than now ({other})"]
            aside = self._free_name(f"refused-{folder.name}")
            folder.rename(aside)
            log.warning("checkpoint of step %d refused and moved to %s: %s", step, aside, "; ".join(problems))
        return None

    def _free_name(self, stem: str) -> Path:
        candidates = (self.root / f"{stem}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
        return next(path for path in candidates if not path.exists())
