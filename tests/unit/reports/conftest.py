"""Builds a small store as the stages leave it: real files, real PNGs, no stage code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from math import exp, sin
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

CATEGORIES = ("digit", "colour", "count", "multiple_choice")
ANSWERS = ("seven", "red", "3", "B")
PALETTE = ((214, 69, 65), (38, 120, 178), (63, 150, 90), (240, 180, 40))
MINUTE_DONE = "2026-01-02T10:12:00+00:00"


def digest_of(name: str) -> str:
    """A stage's digest; any 64 hexadecimal digits do."""
    return hashlib.sha256(name.encode()).hexdigest()


@dataclass
class StoreBuilder:
    """Writes stages and runs. `questions` rows go to every evaluation; answers get better from stage to stage."""

    root: Path
    questions: int = 40
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    def key(self, kind: str, name: str) -> str:
        """Folder name of a stage."""
        return f"{kind}-{digest_of(name)[:16]}"

    def stage(self, kind: str, name: str, spec: dict[str, Any] | None = None, **record: Any) -> Path:
        """Publish a finished stage and return its folder."""
        folder = self.root / "stages" / self.key(kind, name)
        (folder / "output").mkdir(parents=True, exist_ok=True)
        parents = record.pop("parents", {})
        write(
            folder / "spec.json", {"kind": kind, "version": 1, "spec": spec or {}, "parents": parents, "settings": {}}
        )
        manifest = {
            "format": 1,
            "kind": kind,
            "name": name,
            "seconds": record.pop("seconds", 3.5),
            "peak_rss_mib": 812.5,
        }
        write(folder / "manifest.json", {**manifest, "summary": {}, "versions": {"tinylmm": "0.1.0"}, **record})
        self.stages[name] = {"kind": kind, "name": name, "digest": digest_of(name), "key": folder.name}
        return folder

    def losses(self, folder: Path, start: float, steps: int) -> None:
        """A falling, noisy curve."""
        rows = (
            {
                "step": s,
                "steps": steps,
                "loss": start * exp(-s / steps * 2) + 0.2 * sin(s * 1.7),
                "lr": 1e-3,
                "samples_per_s": 120.0,
            }
            for s in range(1, steps + 1)
        )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def images(self) -> None:
        """The data stage with one picture a question."""
        folder = self.stage("data", "digits", seconds=2.1) / "output" / "images" / "test"
        folder.mkdir(parents=True)
        for index in range(self.questions):
            picture = Image.new("RGB", (32, 32), (245, 245, 240))
            drawing = ImageDraw.Draw(picture)
            for place in range(index % 3 + 1):
                box = (2 + 10 * place, 4 + 5 * place, 10 + 10 * place, 14 + 5 * place)
                drawing.ellipse(box, fill=PALETTE[(index + place) % 4])
            picture.save(folder / f"{index}.png")

    def evaluation(self, model: str, right_of_ten: int, **change: Any) -> Path:
        """An eval stage on `model` that answers `right_of_ten` of ten rightly; `change` goes into each row."""
        parents = {"model": digest_of(model), "data": digest_of("digits")}
        folder = self.stage(
            "eval", f"digits@{model}", {"source": {"file": "test.jsonl", "images": "images/test"}}, parents=parents
        )
        rows = []
        for index in range(self.questions):
            kind = index % 4
            right, blind = index * 7 % 10 < right_of_ten, index % 5 == 0
            row = {
                "question_id": f"q{index}",
                "image": f"{index}.png",
                "category": CATEGORIES[kind],
                "question": (
                    "What digit is at the top?",
                    "What colour is the digit?",
                    "How many digits are there?",
                    "Which digit is it?\nA. 1\nB. 7",
                )[kind],
                "truth": ANSWERS[kind],
                "text": ANSWERS[kind] if right else "nine",
                "correct": right,
                "blind_text": ANSWERS[kind] if blind else "one",
                "blind_correct": blind,
                "options": 10,
            }
            rows.append({**row, **change})
        (folder / "output" / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.scores(folder, [score(name, rows) for name in (None, *dict.fromkeys(row["category"] for row in rows))])
        return folder

    def scores(self, folder: Path, metrics: list[dict[str, Any]]) -> None:
        """Write an evaluation's scores.json."""
        write(folder / "output" / "scores.json", {"benchmark": "digits", "protocol": "exact match", "metrics": metrics})

    def run(self, name: str, *, status: str = "done", finished: str | None = MINUTE_DONE, **stage_status: str) -> Path:
        """A run that points at every stage written so far; `stage_status` says which have another status than run."""
        stages = [
            {
                **record,
                "status": stage_status.get(stage, "run"),
                "seconds": 12.5 if stage_status.get(stage, "run") == "run" else None,
            }
            for stage, record in self.stages.items()
        ]
        record = {"format": 1, "name": name, "overrides": ["llm=nano", "recipe=base"], "status": status}
        record |= {
            "created": "2026-01-02T10:00:00+00:00",
            "finished": finished,
            "pid": 1,
            "host": "laptop",
            "spec": SPEC,
        }
        write(
            self.root / "runs" / name / "run.json",
            {**record, "stages": stages, "versions": {"tinylmm": "0.1.0", "torch": "2.13.0"}},
        )
        return self.root / "runs" / name

    def whole(self, name: str = "nano-base", **change: Any) -> Path:
        """A finished run: data, parts, two training stages, an evaluation after each."""
        self.images()
        self.losses(self.stage("parts", "llm/nano", seconds=41.0), 5.0, 60)
        self.stage("prepare", "prepare[pretrain]")
        self.losses(self.stage("train", "pretrain"), 3.0, 80)
        self.evaluation("pretrain", 3)
        self.losses(self.stage("train", "finetune"), 2.0, 120)
        self.evaluation("finetune", 8, **change)
        return self.run(name, **{"llm/nano": "reused"})


SPEC: dict[str, Any] = {
    "seed": 0,
    "llm": {"name": "nano", "init": "built"},
    "vision_tower": {"name": "siglip", "init": "pretrained", "pretrained": "google/siglip-base"},
    "connector": {"name": "mlp"},
    "recipe": {
        "name": "base",
        "stages": {
            "pretrain": {
                "data": "pretrain",
                "tune": {"llm": "frozen", "connector": "full"},
                "lr": 0.001,
                "global_batch": 32,
                "epochs": 1.0,
            },
            "finetune": {
                "data": "finetune",
                "tune": {"llm": "full", "vision_tower": {"from_layer": 0.5}},
                "lr": {"llm": 2e-5},
                "global_batch": 32,
                "max_steps": 120,
            },
        },
    },
    "data": {"name": "digits"},
}


def score(category: str | None, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A scores.json metric counted from generations."""
    kept = [row for row in rows if category in (None, row["category"])]
    share = {key: 100 * sum(bool(row[key]) for row in kept) / len(kept) for key in ("correct", "blind_correct")}
    metric = "accuracy" if category is None else f"accuracy/{category}"
    return {
        "metric": metric,
        "value": share["correct"],
        "blind": share["blind_correct"],
        "chance": 10.0,
        "count": len(kept),
    }


def write(path: Path, record: dict[str, Any]) -> None:
    """Write JSON, making folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1))


@pytest.fixture
def store(tmp_path: Path) -> StoreBuilder:
    return StoreBuilder(tmp_path / "store")
