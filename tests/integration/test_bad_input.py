"""One thing wrong, one clear message, exit code 2, nothing lost and nothing written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.integration.project import Project


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lmm=phi2"], "unknown key 'lmm'. Did you mean 'llm'?"),
        (["llm=ph2"], "'ph2' is not a choice of llm; choices: "),
        (["llm=ph2"], ". Did you mean 'phi2'?"),
        (["recipe.stages.pretrain.lr=fast"], "recipe.stages.pretrain.lr: is 'fast'"),
        (["connector._target_=os.system"], "connector._target_: is 'os.system', which is not allowed"),
        (["recipe.stages.pretrain.lrr=1"], "Did you mean 'lr'?"),
        (["trainer.learning_rat=1"], "learning_rat"),
        (["store=/dev/null/store"], "store: nothing can be written to /dev/null/store (Not a directory)"),
        (["launch=local", "launch.nproc=2"], "several ranks or DeepSpeed need backend=torchrun"),
    ],
    ids=["key", "choice", "suggestion", "type", "target", "nested key", "trainer key", "store", "cross field"],
)
def test_a_wrong_word_is_explained(words: list[str], message: str, project: Project) -> None:
    before = sorted(project.root.rglob("*"))
    bare = Project(project.root, ())
    done = bare.train_here(*words)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(project.root.rglob("*")) == before


def test_unreadable_json_is_named_with_its_place(project: Project) -> None:
    path = project.root / "data/finetune.json"
    path.write_text(path.read_text()[:-40])
    done = project.train_here()
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "finetune.json" in done.stderr and "line 1" in done.stderr


def test_missing_data_is_said_in_one_screen_and_nothing_is_written(tmp_path: Path) -> None:
    done = Project(tmp_path, ("llm=phi2", "vt=siglip", "recipe=share")).train_here()
    assert done.returncode == 2
    assert done.stderr.count("looked at:") == 3 and len(done.stderr.splitlines()) < 24
    assert list(tmp_path.rglob("*")) == []


def corrupt(project: Project, kind: str) -> str:
    """Break one thing; returns what the message must name."""
    path = project.root / "data/finetune.json"
    rows = json.loads(path.read_text())
    if kind == "corrupt image":
        image = project.root / "data/images/3-red.png"
        image.write_bytes(image.read_bytes()[:45])
        return "3-red.png"
    if kind == "no conversations":
        del rows[4]["conversations"]
    elif kind == "unknown role":
        rows[4]["conversations"][1]["from"] = "robot"
    elif kind == "two slots, one image":
        rows[4]["conversations"][0]["value"] = "<image><image>\nwhat?"
    path.write_text(json.dumps(rows))
    return "q4"


@pytest.mark.parametrize("kind", ["corrupt image", "no conversations", "unknown role", "two slots, one image"])
def test_a_broken_record_stops_the_run_or_is_skipped_and_counted(kind: str, project: Project) -> None:
    named = corrupt(project, kind)
    done = project.train_here()
    assert (done.returncode, named in done.stderr) == (2, True), done.stderr
    policy = [f"data.sources.{s}.{p}" for s in ("pretrain", "finetune") for p in ("on_bad=skip", "max_bad=4")]
    done = project.train_here(*policy, "recipe.stages.finetune.max_steps=1", "recipe.stages.pretrain.max_steps=1")
    assert done.returncode == 0, done.stderr
    manifests = [json.loads((stage / "manifest.json").read_text()) for stage in project.stages("prepare")]
    summary = next(m["summary"] for m in manifests if m["name"] == "prepare[finetune]")
    assert summary["skipped"] == (2 if kind == "corrupt image" else 1)
    assert named in json.dumps(summary["skipped_records"])
    (remark,) = summary["remarks"]
    assert Path(remark.split("; ")[1].removesuffix(" lists them")).is_file(), "a path that leads somewhere"


def test_a_missing_image_is_found_before_anything_starts(project: Project) -> None:
    (project.root / "data/images/3-red.png").unlink()
    done = project.train_here()
    assert done.returncode == 2 and "1 of 12 images of llava_v1_5/pretrain (3-red.png)" in done.stderr
    assert not project.store.exists() or not project.stages("prepare")


def test_a_gpu_precision_without_a_gpu_is_refused(project: Project) -> None:
    done = project.train_here("recipe.stages.pretrain.precision=bf16", "launch.device=auto")
    assert done.returncode == 2 and "no CUDA GPU was found" in done.stderr and "launch.device=cpu" in done.stderr


def test_images_are_really_read_by_the_run(project: Project) -> None:
    Image.new("RGB", (8, 8)).save(project.root / "data/images/3-red.png")
    assert (
        project.train_here("recipe.stages.pretrain.max_steps=1", "recipe.stages.finetune.max_steps=1").returncode == 0
    )
