"""Names of files and folders in the store, each in this one place. No torch."""

from __future__ import annotations

SPEC_FILE = "spec.json"
JOB_FILE = "job.json"
ERROR_FILE = "error.txt"
LOG_FILE = "log.txt"
METRICS_FILE = "metrics.jsonl"
OUTPUT_FOLDER = "output"
CHECKPOINT_FOLDER = "checkpoints"
MODEL_FOLDER = "model"
"""Below a train stage's output."""
STAGES_FOLDER = "stages"
FEATURES_FOLDER = "features"
