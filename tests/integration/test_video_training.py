"""Training on clips, images and text in one run: packed rows, features kept once a clip, damaged clips named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.project import Project, tiny_project
from tests.videos import write_video
from tinylmm.config.description import ModelDescription
from tinylmm.data import video as videos

SAMPLING = "video.sampling={uniform: 4}"
SHORT = (
    *("recipe.stages.pretrain.epochs=1", "recipe.stages.finetune.epochs=1", "recipe.stages.finetune.max_length=256"),
    SAMPLING,
)
LENGTHS = (1, 3, 9, 20)
RESAMPLER = (
    *("connector=group_resampler", "connector.options.num_queries=6", "connector.options.groups=3"),
    *("connector.options.heads=2", "connector.options.head_dim=4", "connector.options.depth=1"),
)


def clip(name: str, question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": f"{name}:{answer}", "video": name, "conversations": turns, **more}


def add_clips(project: Project) -> None:
    """Every clip in both files, twice in the second, beside the images and the text that are there."""
    images = project.root / "data/images"
    (images / "clips").mkdir()
    for frames in LENGTHS:
        write_video(images / f"clips/{frames}.mp4", frames)
    names = [f"clips/{frames}.mp4" for frames in LENGTHS]
    both = clip("clips/9.mp4", "<video>\nIs this in it: <image>?", "no", image="0-red.png")
    for stage, records in {
        "pretrain": [clip(name, "<image>\nDescribe.", "a blue square moves") for name in names],
        "finetune": [clip(name, "<video>\nWhich?", word) for name in names for word in ("blue", "a square")] + [both],
    }.items():
        path = project.root / f"data/{stage}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) + records))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """One store for all tests of this file."""
    project = tiny_project(tmp_path_factory.mktemp("clips"))
    add_clips(project)
    yield project


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the video files that are opened from now on, in this process, where a test's stages run."""
    names: list[str] = []
    real = videos._opened

    def counted(path: Path) -> Any:
        names.append(path.name)
        return real(path)

    monkeypatch.setattr(videos, "_opened", counted)
    return names


def trained(project: Project, *words: str) -> dict[str, Any]:
    """Train, and return the summary of each training."""
    done = project.train_here(*SHORT, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    given = dict(word.partition("=")[::2] for word in words)
    store = project.root / given.get("store", "store")
    record = json.loads((store / "runs" / given["name"] / "run.json").read_text())
    folders = {row["name"]: store / "stages" / row["key"] for row in record["stages"]}
    return {row: json.loads((path / "manifest.json").read_text())["summary"] for row, path in folders.items()}


@pytest.fixture(scope="module")
def first(project: Project) -> dict[str, Any]:
    """What the first run of all found."""
    return trained(project, "name=first")


def described(project: Project, name: str) -> ModelDescription:
    record = json.loads((project.store / "runs" / name / "run.json").read_text())
    return ModelDescription.of_folder(project.store / "stages" / record["stages"][-1]["key"] / "output/model")


def tokens_of(found: dict[str, Any], image: int, each: int) -> int:
    """Positions of the pretraining: 24 captions of images, and one of each of 4 clips."""
    return int(found["prepare[pretrain]"]["tokens"]) - (24 + 4) + 24 * image + 4 * each


def test_clips_images_and_text_train_in_one_run_and_each_clip_is_encoded_once(
    project: Project, first: dict[str, Any]
) -> None:
    assert first["images[pretrain]"] == {"images": 12, "faulty": 0, "videos": 4, "videos_decoded": 4}
    assert first["images[finetune]"] == {"images": 12, "faulty": 0, "videos": 4, "videos_decoded": 0}, "the same files"
    assert first["prepare[finetune]"]["samples"] == 24 + 5 + 9
    assert (first["pretrain"]["clips_encoded"], first["finetune"]["clips_encoded"]) == (4, 0)
    assert first["pretrain"]["data"]["tokens"] == tokens_of(first, 4, 4 * 4), "frame by frame: 4 tokens each"
    sampling = described(project, "first").sampling
    assert sampling is not None and sampling.given() == {"uniform": 4}


def test_a_second_run_decodes_nothing(project: Project, first: dict[str, Any], opened: list[str]) -> None:
    found = trained(project, "name=again", "recipe.stages.pretrain.lr=5e-4")
    assert (found["pretrain"]["clips_encoded"], found["finetune"]["clips_encoded"]) == (0, 0)
    assert opened == []


def test_a_resampler_takes_a_clips_frames_together(project: Project, first: dict[str, Any], opened: list[str]) -> None:
    found = trained(project, "name=together", *RESAMPLER)
    assert found["pretrain"]["data"]["tokens"] == tokens_of(found, 6, 6)
    assert opened == [], "the connectors share the tower and its features"


@pytest.mark.slow
def test_another_sampling_shows_other_frames(project: Project, first: dict[str, Any], opened: list[str]) -> None:
    found = trained(project, "name=rate", "video.sampling={uniform: null, fps: 10, distinct: true}")
    # 25 frames a second: clips of 1, 3, 9 and 20 frames have 1, 1, 3 and 8
    assert found["pretrain"]["data"]["tokens"] == tokens_of(first, 4, 0) + (1 + 1 + 3 + 8) * 4
    assert found["pretrain"]["clips_encoded"] == 4
    assert sorted(opened) == sorted(f"{n}.mp4" for n in LENGTHS * 2), "once to check and once to encode"


@pytest.mark.slow
def test_features_that_are_not_kept_are_computed_at_every_step(project: Project, first: dict[str, Any]) -> None:
    """The same loss, as the tower sees the same frames."""
    found = trained(project, "name=uncached", "store=store2", "launch.cache_features=false")
    assert "clips_encoded" not in found["pretrain"]
    assert found["finetune"]["train_loss"] == pytest.approx(first["finetune"]["train_loss"], abs=1e-5)


def test_damaged_clips_are_named_and_left_out_where_that_is_allowed(project: Project) -> None:
    images, path = project.root / "data/images", project.root / "data/damaged.json"
    whole = (images / "clips/20.mp4").read_bytes()
    (images / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    records = json.loads((project.root / "data/pretrain.json").read_text())
    path.write_text(json.dumps([*records, clip("cut.mp4", "<image>\nDescribe.", "never")]))
    words = ["data.sources.pretrain.annotations=damaged.json"]
    refused = project.train_here(*SHORT, *words, "name=refused")
    assert refused.returncode == 2 and "1 bad records, 0 allowed" in refused.stderr and "cut.mp4" in refused.stderr
    found = trained(
        project, "name=allowed", *words, "data.sources.pretrain.on_bad=skip", "data.sources.pretrain.max_bad=1"
    )
    assert found["images[pretrain]"] == {"images": 12, "faulty": 1, "videos": 4, "videos_decoded": 0}
    (bad,) = found["prepare[pretrain]"]["skipped_records"]
    assert bad["sample_id"] == "cut.mp4:never" and "cut.mp4" in bad["reason"]


def test_clips_without_a_sampling_are_refused_with_what_to_set(project: Project) -> None:
    refused = project.train_here("name=unsaid")
    assert refused.returncode == 2
    assert "nothing says which frames of it to show: set video.sampling={uniform: 16}" in refused.stderr


def test_clips_that_do_not_fit_are_refused_before_anything_starts(project: Project) -> None:
    refused = project.train_here("name=long", "video.sampling={uniform: 40}")
    assert refused.returncode == 2 and not (project.store / "runs/long").exists()
    assert (
        "40 frames take 160 tokens with connector=mlp, but recipe.stages.pretrain.max_length is 128" in refused.stderr
    )
    assert "Show at most 31 frames" in refused.stderr


def test_a_missing_clip_is_named_before_anything_starts(project: Project) -> None:
    path = project.root / "data/missing.json"
    path.write_text(json.dumps([clip("nowhere.mp4", "<image>\nDescribe.", "x")]))
    refused = project.train_here(*SHORT, "name=missing", "data.sources.pretrain.annotations=missing.json")
    assert refused.returncode == 2 and "nowhere.mp4" in refused.stderr and "nothing was started" in refused.stderr


def questions(project: Project) -> list[str]:
    """Three questions about each clip, and one about an image; the words that ask them of the last stage's model."""
    rows = [
        {"question_id": f"{n}-{word}", "video": f"clips/{n}.mp4", "text": f"Is it {word}?", "category": "clip"}
        for n in LENGTHS
        for word in ("red", "blue", "a square")
    ]
    rows.append({"question_id": "image", "image": "0-red.png", "text": "Is it red?", "category": "image"})
    lines = (json.dumps(row | {"answer": "yes", "options": 2}) + "\n" for row in rows)
    (project.root / "data/test.jsonl").write_text("".join(lines))
    source = "{annotations: test.jsonl, images: images, format: questions}"
    data = f"{{name: asked, root: {project.root / 'data'}, build: null, sources: {{test: {source}}}}}"
    return ["eval=digits", f"eval.digits.data={data}", "eval.digits.after=last", "eval.digits.max_new_tokens=3"]


def test_questions_about_clips_are_asked_and_each_clip_is_encoded_once_for_all_models(
    project: Project, first: dict[str, Any]
) -> None:
    words = questions(project)
    found = trained(project, "name=asked", *words)["digits@finetune"]
    assert (found["questions"], found["images"], found["images_encoded"]) == (13, 5, 1)
    assert (found["frames"], found["clips_encoded"]) == ("uniform 4", 0), "the training's own features"
    again = trained(project, "name=asked-again", *words, "recipe.stages.finetune.lr=1e-4")["digits@finetune"]
    assert (again["clips_encoded"], again["images_encoded"]) == (0, 1), "the other model's tower is the same"
    more = trained(project, "name=more", *words, "eval.digits.sampling={uniform: 2}")["digits@finetune"]
    assert (more["frames"], more["clips_encoded"]) == ("uniform 2", 4)


def test_a_damaged_clip_among_the_questions_is_refused_or_counted(project: Project, first: dict[str, Any]) -> None:
    words = questions(project)
    images, path = project.root / "data/images", project.root / "data/test.jsonl"
    whole = (images / "clips/20.mp4").read_bytes()
    (images / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    row = {"question_id": "torn", "video": "torn.mp4", "text": "?", "category": "clip", "answer": "yes", "options": 2}
    path.write_text(path.read_text() + json.dumps(row) + "\n")
    refused = project.train_here(*SHORT, "name=torn", *words)
    assert refused.returncode == 2 and "torn.mp4: cannot be read as a video" in refused.stderr
    allowed = ["eval.digits.on_bad=skip", "eval.digits.max_bad=1"]
    found = trained(project, "name=torn-allowed", *words, *allowed)["digits@finetune"]
    assert (found["unreadable"], found["questions"]) == (1, 14)
    again = project.train_here(*SHORT, "name=torn-again", *words)
    assert again.returncode == 2 and "was asked without 1 images or videos" in again.stderr


@pytest.mark.slow
def test_answers_about_clips_are_the_same_without_kept_features(project: Project, first: dict[str, Any]) -> None:
    words = questions(project)
    trained(project, "name=kept", *words)
    trained(project, "name=not-kept", "store=store3", "launch.cache_features=false", *words)
    texts = []
    for store in ("store", "store3"):
        (path,) = (project.root / store).glob("stages/eval-*/output/generations.jsonl")
        texts.append([json.loads(line)["text"] for line in path.read_text().splitlines()])
    assert texts[0] == texts[1] and len(texts[0]) == 13


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["torchrun", "zero3"])
def test_two_ranks_share_clips_of_different_lengths(project: Project, launch: str) -> None:
    """Some micro-batches have clips of several lengths, some only images or text: ranks run the same modules all the same."""
    words = ["video.sampling={fps: 10, distinct: true}", *RESAMPLER, "recipe.stages.finetune.max_length=256"]
    epochs = ("recipe.stages.pretrain.epochs=1", "recipe.stages.finetune.epochs=1")
    losses = []
    for ranks, name in ((1, "one"), (2, "two")):
        store = f"store-{launch}-{ranks}"
        how = [f"launch={launch}", f"launch.nproc={ranks}", "launch.micro_batch=2", f"store={store}", f"name={name}"]
        done = project.train(*epochs, *words, *how, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
        record = json.loads((project.root / store / "runs" / name / "run.json").read_text())
        folder = project.root / store / "stages" / record["stages"][-1]["key"]
        losses.append(json.loads((folder / "manifest.json").read_text())["summary"]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
