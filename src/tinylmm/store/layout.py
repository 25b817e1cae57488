"""Names of files and folders in the store, each in this one place. No torch.

stages/<key>    finished stages; work/<key> those being worked on, damaged/<key>-n those set aside
runs/<name>     run.json, log.txt
claims/         who works on which stage
features/       features of frozen towers, cache/ fingerprints of files outside the store: made again when deleted
pixels/         transformed images of trainings, by their content: made again when deleted
published/      weights from outside the store that trainings leave as they are, each once; models hold hard links to them
imported/       models made of other tools' checkpoints, to be asked: made again when deleted
certificates/   what `tinylmm verify` found of trainings
reports/        pages and tables
slurm/          what SLURM's jobs were given and have said, and which job makes which stage
tracking/       files of Weights & Biases, for `wandb sync`
trash/          about to be deleted
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STAGES_FOLDER = "stages"
WORK_FOLDER = "work"
SLURM_FOLDER = "slurm"
DAMAGED_FOLDER = "damaged"
RUNS_FOLDER = "runs"
CLAIMS_FOLDER = "claims"
FEATURES_FOLDER = "features"
PIXELS_FOLDER = "pixels"
PUBLISHED_FOLDER = "published"
CACHE_FOLDER = "cache"
IMPORTED_FOLDER = "imported"
CERTIFICATES_FOLDER = "certificates"
REPORTS_FOLDER = "reports"
TRACKING_FOLDER = "tracking"
TRASH_FOLDER = "trash"

RUN_FILE = "run.json"
SPEC_FILE = "spec.json"
MANIFEST_FILE = "manifest.json"
MARKER_FILE = "COMPLETE"
JOB_FILE = "job.json"
ERROR_FILE = "error.txt"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
CHECKPOINT_FOLDER = "checkpoints"
OUTPUT_FOLDER = "output"
FEATURES_USED_FILE = "features.json"
"""Beside a train stage's spec: the names of the folders below `features/` that it reads, so that these are kept with it."""
PIXELS_USED_FILE = "pixels.json"
"""As FEATURES_USED_FILE, of folders below `pixels/`."""
MODEL_FOLDER = "model"
"""Below a train stage's output."""
GENERATIONS_FILE = "generations.jsonl"
SCORES_FILE = "scores.json"
"""Below an eval stage's output."""

KEY_DIGITS = 16
"""Of a digest's 64 hexadecimal digits, how many stand in a folder's name."""


def stage_key(kind: str, digest: str) -> str:
    """Return the name of a stage's folder, `train-0123456789abcdef`."""
    return f"{kind}-{digest[:KEY_DIGITS]}"


def model_folder(stage_folder: Path) -> Path:
    """Return where the model of a train stage lies."""
    return stage_folder / OUTPUT_FOLDER / MODEL_FOLDER


@dataclass(frozen=True)
class StoreLayout:
    """Where things lie in the store at `root`. Nothing is read or made."""

    root: Path

    @property
    def stages(self) -> Path:
        """Folder of the finished stages."""
        return self.root / STAGES_FOLDER

    @property
    def work(self) -> Path:
        """Folder of the stages that are worked on."""
        return self.root / WORK_FOLDER

    @property
    def damaged(self) -> Path:
        """Folder of what was set aside."""
        return self.root / DAMAGED_FOLDER

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.root / RUNS_FOLDER

    @property
    def features(self) -> Path:
        """Folder of the cached features of frozen towers."""
        return self.root / FEATURES_FOLDER

    @property
    def pixels(self) -> Path:
        """Folder of the transformed images of trainings."""
        return self.root / PIXELS_FOLDER

    @property
    def published(self) -> Path:
        """Folder of weights from outside the store that trainings leave as they are."""
        return self.root / PUBLISHED_FOLDER

    @property
    def imported(self) -> Path:
        """Folder of models that were made of other tools' checkpoints, each by the checkpoint's content."""
        return self.root / IMPORTED_FOLDER

    @property
    def cache(self) -> Path:
        """Folder of cached fingerprints."""
        return self.root / CACHE_FOLDER

    @property
    def fingerprints(self) -> Path:
        """Folder of what is known of files outside the store."""
        return self.cache / "fingerprints"

    @property
    def certificates(self) -> Path:
        """Folder of what `tinylmm verify` found."""
        return self.root / CERTIFICATES_FOLDER

    @property
    def reports(self) -> Path:
        """Folder that reports are written to where the user names no other."""
        return self.root / REPORTS_FOLDER

    @property
    def tracking(self) -> Path:
        """Folder of what trackers keep for themselves."""
        return self.root / TRACKING_FOLDER

    @property
    def slurm(self) -> Path:
        """Folder of SLURM's jobs."""
        return self.root / SLURM_FOLDER

    @property
    def trash(self) -> Path:
        """Folder of what is about to be deleted."""
        return self.root / TRASH_FOLDER

    def stage(self, key: str) -> Path:
        """Where a finished stage lies, or will lie."""
        return self.stages / key

    def work_on(self, key: str) -> Path:
        """Where a stage is worked on."""
        return self.work / key

    def claim(self, key: str) -> Path:
        """The file that names who works on a stage."""
        return self.root / CLAIMS_FOLDER / f"{key}.json"

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.runs / name
