"""Checks that a finished quickstart holds its figures: `python -m tests.acceptance STORE`."""

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


if __name__ == "__main__":
    problems = failures(Path(sys.argv[1]))
    sys.stdout.write("\n".join(problems) + "\n" if problems else "quickstart holds its figures\n")
    sys.exit(1 if problems else 0)
