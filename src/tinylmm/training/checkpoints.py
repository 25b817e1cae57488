"""Crash-safe checkpoints of a training stage: our own, as transformers and DeepSpeed write in place and unchecked.

A checkpoint is written to a staging folder, hashed, synced, renamed by rank 0 after a barrier, and only then are older ones
rotated out. Reading takes the newest one whose every SHA-256 holds; a bad one is set aside by name, never deleted.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from tinylmm.errors import UserError
from tinylmm.store import integrity
from tinylmm.training.metrics import MetricsFile
from tinylmm.training.state import Form

log = logging.getLogger(__name__)

PREFIX = "checkpoint-"


FORMAT = 3
"""Of the files in a checkpoint."""
ROWS_FILE = "rows.jsonl"
"""Progress rows up to its step, so that a curve has no hole where the stage's own file was damaged meanwhile."""


@dataclass(frozen=True)
class Ranks:
    """How a training is spread: the number of ranks, and the ZeRO stage if there is one."""

    world_size: int
    deepspeed_stage: int | None

    def can_read(self, form: Form, writer: Ranks) -> bool:
        """Whether an optimiser's state in this form, written by `writer`, can be read here (`training/state.py`)."""
        if form == "by name":
            return True
        return self == writer if form == "partitioned" else self.deepspeed_stage is None

    def words(self) -> str:
        """The words of a command that choose it."""
        if self.deepspeed_stage is not None:
            return f"launch=zero{self.deepspeed_stage} launch.nproc={self.world_size}"
        return f"launch=torchrun launch.nproc={self.world_size}" if self.world_size > 1 else "launch=local"


class CheckpointFolder:
    """The `checkpoints/` folder of one stage.

    Args:
        root: the folder.
        keep: how many published checkpoints are kept, at least 2: the newest may turn out damaged.
        digest: of the stage: no other stage's checkpoint is resumed.
        ranks: how this training is spread; another one's checkpoint is resumed wherever its form allows.
        rows: the training's progress rows, of which each checkpoint keeps a copy.
    """

    def __init__(self, root: Path, keep: int, digest: str, ranks: Ranks, rows: MetricsFile) -> None:
        self.root = root
        self.keep = keep
        self.digest = digest
        self.ranks = ranks
        self.rows = rows

    def staging(self) -> Path:
        """Where the next checkpoint is written before it counts."""
        return self.root / "staging"

    def staged(self, step: int) -> Path:
        """Where the checkpoint of this step is written."""
        return self.staging() / f"{PREFIX}{step}"

    def clear_staging(self, step: int) -> None:
        """Remove what a killed save left behind, and make room for this step's checkpoint. Rank 0 only."""
        shutil.rmtree(self.staging(), ignore_errors=True)
        self.staged(step).mkdir(parents=True)

    def publish(self, step: int, form: Form) -> Path:
        """Make the staged checkpoint of `step` count, then rotate. Rank 0 only, after every rank has written its files."""
        staged = self.staged(step)
        final = self.root / f"{PREFIX}{step}"
        (staged / ROWS_FILE).write_bytes(self.rows.content())
        record = {"format": FORMAT, "step": step, "digest": self.digest, "form": form, **asdict(self.ranks)}
        integrity.write_manifest(staged, record)
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
        """Return the newest checkpoint whose files are all there and unaltered; set damaged ones aside. Rank 0 only.

        Raises:
            UserError: it can only be continued by another launch; nothing has been touched.
        """
        for step, folder in reversed(self.published()):
            problems = integrity.check_folder(folder) or self._foreign(folder)
            if not problems:
                self._check_ranks(folder)
                return folder
            aside = self._free_name(f"refused-{folder.name}")
            folder.rename(aside)
            log.warning("checkpoint of step %d refused and moved to %s: %s", step, aside, "; ".join(problems))
        return None

    def forget_after(self, checkpoint: Path | None) -> None:
        """Let the progress rows end where the training goes on: at this checkpoint, or at nothing. Rank 0 only."""
        if checkpoint is None:
            self.rows.forget_after(0)
        else:
            step = int(checkpoint.name.removeprefix(PREFIX))
            self.rows.forget_after(step, (checkpoint / ROWS_FILE).read_bytes())

    def _foreign(self, folder: Path) -> list[str]:
        wanted = {"digest": self.digest, "format": FORMAT}
        found = integrity.read_manifest(folder)
        other = {key: value for key, value in wanted.items() if found.get(key) != value}
        return [f"it was written with another {', '.join(other)} than now ({other})"] if other else []

    def _check_ranks(self, folder: Path) -> None:
        record = integrity.read_manifest(folder)
        writer = Ranks(record["world_size"], record["deepspeed_stage"])
        if writer != self.ranks:
            log.info("%s was written under %s and is continued under %s", folder, writer.words(), self.ranks.words())
        if not self.ranks.can_read(record["form"], writer):
            raise UserError(
                f"{folder} was written under `{writer.words()}`, and the state of its optimiser cannot be shared out for "
                f"`{self.ranks.words()}`. Continue with {writer.words()}, or delete {self.root} to begin this stage anew."
            )

    def _free_name(self, stem: str) -> Path:
        candidates = (self.root / f"{stem}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 10_000))))
        return next(path for path in candidates if not path.exists())
