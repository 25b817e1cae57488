"""A tiny project on disk: twelve images, a LLaVA JSON a stage, a tokenizer, and the words that train on them in seconds."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.builders import IMAGE_SIZE, LLAMA, VISION, tiny_tokenizer
from tinylmm.cli.errors import guarded
from tinylmm.cli.train import run

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@dataclass(frozen=True)
class Project:
    """Where it lies, and the words of its command line."""

    root: Path
    words: tuple[str, ...]

    @property
    def store(self) -> Path:
        return self.root / "store"

    def command(self, *more: str) -> list[str]:
        return [sys.executable, "-m", "tinylmm.cli.train", *self.words, *more]

    def train(self, *more: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*more), cwd=self.root, env=environment(), capture_output=True, text=True, timeout=timeout
        )

    def train_here(self, *more: str) -> subprocess.CompletedProcess[str]:
        """The same in this process: what a command says and leaves needs no new one, which spends seconds on imports."""
        said, errors = io.StringIO(), io.StringIO()
        words = [*self.words, *more]
        with contextlib.chdir(self.root), contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            code = guarded(lambda: run(words))
        return subprocess.CompletedProcess(words, code, said.getvalue(), errors.getvalue())

    def stages(self, kind: str) -> list[Path]:
        return sorted((self.store / "stages").glob(f"{kind}-*"))

    def model(self, name: str) -> Path:
        """Model folder of the finished train stage called `name`."""
        found = [s for s in self.stages("train") if json.loads((s / "manifest.json").read_text())["name"] == name]
        assert len(found) == 1, f"{len(found)} finished train stages are called {name}"
        return found[0] / "output/model"


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}


def write_images(folder: Path) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (colour, rgb) in enumerate([*COLOURS.items()] * 4):
        name = f"{number}-{colour}.png"
        Image.new("RGB", (IMAGE_SIZE + number, IMAGE_SIZE), rgb).save(folder / name)
        names.append(name)
    return names


def tiny_project(root: Path) -> Project:
    names = write_images(root / "data/images")
    captions = [
        {
            "id": f"c{i}",
            "image": n,
            "conversations": [
                {"from": "human", "value": "<image>\nDescribe."},
                {"from": "gpt", "value": f"a {n.split('-')[1][:-4]} square"},
            ],
        }
        for i, n in enumerate(names)
    ]
    questions = [
        {
            "id": f"q{i}",
            "image": n,
            "conversations": [
                {"from": "human", "value": "<image>\nWhich colour?"},
                {"from": "gpt", "value": n.split("-")[1][:-4]},
                {"from": "human", "value": "Is it red?"},
                {"from": "gpt", "value": "yes" if "red" in n else "no"},
            ],
        }
        for i, n in enumerate(names * 2)
    ]
    text = [
        {"id": f"t{i}", "conversations": [{"from": "human", "value": f"Say {i}."}, {"from": "gpt", "value": str(i)}]}
        for i in range(5)
    ]
    (root / "data/pretrain.json").write_text(json.dumps(captions * 2))
    (root / "data/finetune.json").write_text(json.dumps(questions + text))
    tiny_tokenizer().save_pretrained(root / "tokenizer")
    return Project(root, tuple(_words(root)))


def _words(root: Path) -> list[str]:
    words = [
        "llm=tinyllama",
        "llm.init=random",
        f"llm.tokenizer.pretrained={root / 'tokenizer'}",
        "llm.tokenizer.revision=null",
    ]
    words += [f"llm.architecture.{key}={value}" for key, value in LLAMA.items()]
    words += ["vt=siglip", "vision_tower.init=random", f"vision_tower.image.size={IMAGE_SIZE}"]
    words += [f"vision_tower.architecture.{key}={value}" for key, value in VISION.items()]
    words += ["data=llava_v1_5", f"data.root={root / 'data'}", "eval=none"]
    for stage, samples in (("pretrain", 8), ("finetune", 8)):
        words += [f"data.sources.{stage}.annotations={stage}.json", f"data.sources.{stage}.images=images"]
        words += [
            f"recipe.stages.{stage}.{field}"
            for field in ("lr=1e-3", f"global_batch={samples}", "precision=fp32", "max_length=128")
        ]
    words += ["recipe.stages.pretrain.epochs=2", "recipe.stages.finetune.epochs=3"]
    return [*words, "launch.micro_batch=4", "tracking.log_steps=1", "tracking.tensorboard=false"]
