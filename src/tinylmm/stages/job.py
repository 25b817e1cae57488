"""What a stage works on: one node of the graph, made concrete as a folder that every rank can read.

The parent writes `job.json` into the stage's work folder; the code of the stage kind (in this process or in torchrun's
ranks) reads it back and needs nothing else: no Hydra, no planner, no store.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

JOB_FILE = "job.json"
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class StageJob:
    """One stage about to run.

    Attributes:
        kind: data, parts, prepare, train or eval.
        name: the stage's name in this run, for people ("pretrain"); not part of its identity.
        digest: 64 hexadecimal digits.
        spec: every field that decides the result (what the digest is made of).
        parents: role -> `output` folder of the finished stage that plays it.
        settings: how to run it (launch and tracking fields); decides no result.
        folder: the work folder; everything that shall be kept goes to `output`.
    """

    kind: str
    name: str
    digest: str
    spec: dict[str, Any]
    parents: dict[str, Path]
    settings: dict[str, Any]
    folder: Path

    @property
    def output(self) -> Path:
        """What is published when the stage is done. The parent has created it."""
        return self.folder / "output"

    def write(self) -> None:
        """Write `job.json` into the work folder."""
        record = asdict(self)
        record["parents"] = {role: str(path) for role, path in self.parents.items()}
        record["folder"] = str(self.folder)
        (self.folder / JOB_FILE).write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> StageJob:
        """Read the job that `write` left in `folder`."""
        record = json.loads((folder / JOB_FILE).read_text(encoding="utf-8"))
        record["parents"] = {role: Path(path) for role, path in record["parents"].items()}
        record["folder"] = folder
        return cls(**record)

    def forget_metrics_after(self, step: int) -> None:
        """Drop the rows that a killed try wrote after the checkpoint it is resumed from: they are written again."""
        path = self.folder / METRICS_FILE
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def log_metrics(self, **row: Any) -> None:
        """Append one row to metrics.jsonl, stamped with the time. Call it on rank 0 only."""
        line = json.dumps({"time": round(time.time(), 3), **row}, allow_nan=True) + "\n"
        descriptor = os.open(self.folder / METRICS_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf  # a row that a crash cut short
