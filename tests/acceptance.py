"""Checks that a finished quickstart holds its figures: `python -m tests.acceptance STORE [quickstart-video]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

LIMITS = {"accuracy": 80.0, "accuracy/digit": 75.0}
BLIND_BELOW = 50.0


def failures(store: Path) -> list[str]:
    """What does not hold of the newest run's last stage, in sentences."""
    results = max(store.glob("reports/*/results.json"), key=lambda path: path.stat().st_mtime)
    rows = {row["metric"]: row for row in json.loads(results.read_text())["rows"] if row["stage"] == "finetune"}
    found = [
        f"{metric} is {rows[metric]['value']:.1f} %, less than {limit} %"
        for metric, limit in LIMITS.items()
        if rows[metric]["value"] < limit
    ]
    if rows["accuracy"]["blind"] >= BLIND_BELOW:
        found.append(f"blind accuracy is {rows['accuracy']['blind']:.1f} %, not under {BLIND_BELOW} %")
    return found


VIDEO_BEYOND = 20.0
"""Points by which a model that sees a clip must beat itself with the middle frame alone."""


def video_failures(store: Path) -> list[str]:
    """What does not hold of the newest run of quickstart-video, in sentences."""
    results = max(store.glob("reports/*/results.json"), key=lambda path: path.stat().st_mtime)
    rows = [row for row in json.loads(results.read_text())["rows"] if row["stage"] == "finetune"]
    scores = {row["evaluation"]: row for row in rows if row["metric"] == "accuracy"}
    score = scores["moving_digits"]
    baselines = {name: scores[f"moving_digits_{name}"]["value"] for name in ("one_frame", "shuffled")}
    baselines["blind"] = score["blind"]
    beaten = {"one_frame": VIDEO_BEYOND, "blind": VIDEO_BEYOND, "shuffled": 0.0}
    return [
        f"accuracy is {score['value']:.1f} %, not {beaten[name]:g} points above {name} ({value:.1f} %)"
        for name, value in baselines.items()
        if not score["value"] > value + beaten[name]
    ]


CHECKS = {"quickstart": failures, "quickstart-video": video_failures}

if __name__ == "__main__":
    which = sys.argv[2] if len(sys.argv) > 2 else "quickstart"
    problems = CHECKS[which](Path(sys.argv[1]))
    sys.stdout.write("\n".join(problems) + "\n" if problems else f"{which} holds its figures\n")
    sys.exit(1 if problems else 0)
