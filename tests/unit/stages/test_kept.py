"""Pixels that come from the cache are those of the file, bit by bit, in every mode; trainings learn the same with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.builders import IMAGE, redescribe, tiny_loaded
from tests.integration.project import Project, tiny_project
from tests.videos import write_video
from tinylmm.config.spec import ImageSpec
from tinylmm.data.image_folders import ImageFolder, ImageFolders
from tinylmm.data.images import open_image
from tinylmm.data.transform import ImageTransform
from tinylmm.data.video import read_frames
from tinylmm.errors import DataError
from tinylmm.reports.collect import collect_report
from tinylmm.reports.speed import speed_words
from tinylmm.stages.kept import ThroughShelf
from tinylmm.stages.seen import SeenImages
from tinylmm.store.pixels import BYTES, PixelShelf, count_images

MODES: dict[str, dict[str, Any]] = {
    "squash": {"mode": "squash"},
    "bilinear": {"mode": "squash", "resample": "bilinear"},
    "center_crop": {"mode": "center_crop", "square": "center_crop"},
    "short_edge": {"mode": "square", "square": "center_crop", "short_edge": 20},
    "pad": {"mode": "pad", "mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]},
    "anyres": {"mode": "anyres"},
}
SHAPES = ((40, 30), (30, 40), (16, 16), (90, 17), (7, 5))
FRAMES = (0, 3, 5)


def seen_by(root: Path, image: dict[str, Any], upright: bool = False) -> SeenImages:
    loaded = tiny_loaded()
    redescribe(loaded, image=ImageSpec.model_validate(IMAGE | image).model_dump(mode="json"))
    clips = {"video:clip.mp4": FRAMES}
    return SeenImages(ImageFolders([ImageFolder(root, root, upright=upright, clips=clips)]), loaded)


def through(seen: SeenImages, root: Path) -> PixelShelf:
    shelf = PixelShelf(root / "pixels", "shelf", 1 << 30, {"size": seen.transform.size, "mode": seen.transform.mode})
    seen.bytes_of = ThroughShelf(shelf, seen)
    return shelf


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of several shapes as JPEG (one of them turned by its camera), PNG, grey, and a clip."""
    root = tmp_path_factory.mktemp("images")
    drawn = np.random.default_rng(0)
    for number, (width, height) in enumerate(SHAPES):
        noise = Image.fromarray(drawn.integers(0, 256, (height, width, 3), dtype=np.uint8))
        turned = Image.Exif()
        turned[0x0112] = 6
        noise.save(root / f"{number}.jpg", **({"exif": turned} if number == 0 else {}))
        noise.save(root / f"{number}.png")
        noise.convert("L").save(root / f"{number}.webp")
    write_video(root / "clip.mp4", 8)
    return root


@pytest.mark.parametrize("upright", [False, True], ids=["as stored", "upright"])
@pytest.mark.parametrize("image", MODES.values(), ids=MODES)
def test_cached_pixels_are_the_files_bit_by_bit(
    folder: Path, tmp_path: Path, image: dict[str, Any], upright: bool
) -> None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix != ".mp4")
    plain = seen_by(folder, image, upright)
    transform = ImageTransform(**IMAGE | image)
    for _ in range(2):  # made, and then read by another process's object
        cached = seen_by(folder, image, upright)
        shelf = through(cached, tmp_path)
        for name in names:
            expected = transform(open_image(folder / name, upright=upright))
            for found in (plain.pixels(name), cached.pixels(name)):
                assert found.dtype == torch.float32 and torch.equal(found, expected), name
            assert torch.equal(cached.narrow_pixels(name), expected.to(torch.bfloat16)), name
            assert cached.pixels(name).dim() == (4 if image["mode"] == "anyres" else 3)
    assert shelf.take() == (3 * len(names), 3 * len(names))


@pytest.mark.parametrize("image", MODES.values(), ids=MODES)
def test_cached_frames_of_a_clip_are_the_files_bit_by_bit(folder: Path, tmp_path: Path, image: dict[str, Any]) -> None:
    transform = ImageTransform(**IMAGE | image)
    frames = read_frames(folder / "clip.mp4", FRAMES)
    expected = torch.stack([transform.one_view(frame) for frame in frames])
    for _ in range(2):
        cached = seen_by(folder, image)
        shelf = through(cached, tmp_path)
        assert torch.equal(cached.pixels("video:clip.mp4"), expected)
    assert shelf.take() == (1, 1) and count_images(shelf.folder) == 1


def test_transforms_share_what_they_have_in_common_and_nothing_else(folder: Path) -> None:
    geometries = [ImageTransform(**IMAGE | image).geometry for image in MODES.values()]
    geometries += [ImageTransform(**IMAGE | {"size": 8}).geometry]
    geometries += [ImageTransform(**IMAGE | MODES["pad"] | {"mean": [0.5] * 3}).geometry]
    geometries += [ImageTransform(**IMAGE | {"mode": "anyres", "tiles": [[1, 2]]}).geometry]
    geometries += [ImageTransform(**IMAGE | MODES["short_edge"] | {"short_edge": 24}).geometry]
    assert len({json.dumps(one, sort_keys=True) for one in geometries}) == len(geometries)
    other = ImageTransform(**IMAGE | {"mean": [0.1] * 3, "std": [0.3] * 3})
    assert other.geometry == geometries[0], "normalising comes after what is kept"
    image = open_image(folder / "0.jpg")
    assert np.array_equal(other.views(image), ImageTransform(**IMAGE).views(image))


def test_a_changed_file_is_read_again_and_a_copy_is_not(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    (root / "a.png").write_bytes((folder / "0.png").read_bytes())
    seen = seen_by(root, {})
    shelf = through(seen, tmp_path)
    first = seen.pixels("a.png")
    (root / "b.png").write_bytes((folder / "0.png").read_bytes())
    assert torch.equal(seen.pixels("b.png"), first) and shelf.take() == (2, 1)
    (root / "a.png").write_bytes((folder / "1.png").read_bytes())
    assert torch.equal(seen.pixels("a.png"), seen_by(folder, {}).pixels("1.png"))
    assert shelf.take() == (1, 0)


def test_an_image_that_cannot_be_decoded_is_named_and_not_kept(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "half.jpg").write_bytes((folder / "1.jpg").read_bytes()[:-20])
    seen = seen_by(tmp_path, {})
    shelf = through(seen, tmp_path)
    for name, said in (("half.jpg", "damaged or cut short"), ("none.jpg", "not found")):
        with pytest.raises(DataError, match=said):
            seen.pixels(name)
    assert not shelf.exists


# ------------------------------------------------------------------------------------------------ whole trainings

TRAINED_TOWER = ("recipe.stages.pretrain.tune.vision_tower=full", "recipe.stages.finetune.tune.vision_tower=full")
NOT_KEPT = ("launch.cache_features=false",)


def trained(project: Project, name: str, *words: str) -> dict[str, Path]:
    """Train, and return the folder of each training."""
    done = project.train_here(f"name={name}", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    given = dict(word.partition("=")[::2] for word in words)
    store = project.root / given.get("store", "store")
    record = json.loads((store / "runs" / name / "run.json").read_text())
    return {row["name"]: store / "stages" / row["key"] for row in record["stages"] if row["kind"] == "train"}


def summary(stage: Path) -> dict[str, Any]:
    return dict(json.loads((stage / "manifest.json").read_text())["summary"])


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name} {name}": tensor
        for path in sorted((stage / "output/model").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def assert_equal(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    yield tiny_project(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def plain(project: Project) -> dict[str, Path]:
    return trained(project, "plain", "store=plain", *TRAINED_TOWER, "launch.cache_pixels=false")


def test_a_training_of_several_epochs_decodes_each_image_once_and_learns_the_same(
    project: Project, plain: dict[str, Path]
) -> None:
    found = trained(project, "auto", *TRAINED_TOWER)
    assert all("pixels" not in summary(stage) for stage in plain.values())
    assert not (project.root / "plain/pixels").exists()
    for name, stage in found.items():
        assert_equal(stage, plain[name])
    (shelf,) = (project.store / "pixels").iterdir()
    assert count_images(shelf) == 12
    pretrain, finetune = (summary(found[name])["pixels"] for name in ("pretrain", "finetune"))
    # A batch reads an image once: 12 images twice in 24 captions, over 2 epochs.
    assert pretrain["hit_rate"] == pytest.approx(1 - 12 / pretrain["reads"], abs=1e-4)
    assert finetune["hit_rate"] == 1.0, "the second stage reads what the first has kept"
    assert finetune["disk_bytes"] == sum(path.stat().st_size for path in shelf.iterdir())
    rows = [json.loads(line) for line in (found["pretrain"] / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "pixel_reads" in row]
    assert sum(row["pixel_reads"] for row in rows) == pretrain["reads"]
    assert rows[0]["pixel_hit_rate"] < 0.5 and rows[-1]["pixel_hit_rate"] == 1.0
    stages = {stage.name: stage for run in collect_report(project.store).runs for stage in run.stages}
    said = "; ".join(speed_words(stages["finetune"]))
    assert "100.0% of the images read from the pixel cache" in said and "of pixels on disk" in said


def test_another_run_of_a_sweep_reads_what_the_first_has_kept(project: Project, plain: dict[str, Path]) -> None:
    words = (*TRAINED_TOWER, "store=sweep", "recipe.stages.pretrain.epochs=1", "recipe.stages.finetune.epochs=1")
    first = trained(project, "first", *words)
    assert "pixels" not in summary(first["pretrain"]), "auto keeps nothing of what is read once"
    second = trained(project, "second", *words, "launch.cache_pixels=true", "recipe.stages.pretrain.lr=2e-3")
    assert summary(second["finetune"])["pixels"]["hit_rate"] == 1.0
    third = trained(project, "third", *words, "recipe.stages.pretrain.lr=3e-3")
    assert summary(third["pretrain"])["pixels"]["hit_rate"] == 1.0, "auto reads what is there"


def test_features_that_are_kept_need_no_pixels(project: Project) -> None:
    found = trained(project, "features", "store=features")
    assert not (project.root / "features/pixels").exists()
    first, second = (summary(found[name]) for name in ("pretrain", "finetune"))
    assert first["features"]["images"] == 12 and first["features"]["hit_rate"] == 0.0
    assert second["features"]["hit_rate"] == 1.0 and "pixels" not in second
    files = [path.stat().st_size for path in (project.root / "features/features").rglob("features.bin")]
    assert files == [second["features"]["disk_bytes"]]
    stages = {s.name: s for run in collect_report(project.root / "features").runs for s in run.stages}
    assert "100.0% of the images' features were in the store" in "; ".join(speed_words(stages["finetune"]))


def test_a_damaged_cache_changes_nothing(project: Project, plain: dict[str, Path]) -> None:
    words = (*TRAINED_TOWER, "store=damaged", "launch.cache_pixels=true")
    trained(project, "before", *words, "recipe.stages.pretrain.lr=9e-3")
    (data,) = (project.root / "damaged/pixels").rglob(f"*{BYTES}")
    content = bytearray(data.read_bytes())
    content[::700] = bytes(255 - value for value in content[::700])
    data.write_bytes(content)
    found = trained(project, "after", *words)
    for name, stage in found.items():
        assert_equal(stage, plain[name])
    assert 0.0 < summary(found["pretrain"])["pixels"]["hit_rate"] < 1.0
    assert summary(found["finetune"])["pixels"]["hit_rate"] == 1.0


def test_a_full_cache_changes_nothing(project: Project, plain: dict[str, Path]) -> None:
    limit = 5000 / 1024**3  # an image is 768 bytes
    words = (*TRAINED_TOWER, "store=full", f"launch.cache_pixels_gib={limit:.12f}")
    assert all("pixels" not in summary(s) for s in trained(project, "left", *words).values()), "auto: there is no room"
    asked = trained(project, "asked", *words, "launch.cache_pixels=true", "seed=0", "recipe.stages.pretrain.lr=1.5e-3")
    pixels = summary(asked["finetune"])["pixels"]
    assert 0.0 < pixels["hit_rate"] < 1.0 and pixels["disk_bytes"] <= 5000


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_modes_train_the_same_through_the_cache(tmp_path: Path, mode: str) -> None:
    project = tiny_project(tmp_path)
    words = (*TRAINED_TOWER, f"vision_tower.image.mode={mode}", "recipe.stages.finetune.max_steps=2")
    words = (*words, "recipe.stages.pretrain.max_length=160", "recipe.stages.finetune.max_length=160")
    one = trained(project, "one", *words, "store=one", "launch.cache_pixels=false")
    two = trained(project, "two", *words, "store=two", "launch.cache_pixels=true")
    for name, stage in two.items():
        assert_equal(stage, one[name])
        assert summary(stage)["pixels"]["hit_rate"] > 0


@pytest.mark.slow
def test_readers_and_ranks_share_the_cache(project: Project, plain: dict[str, Path]) -> None:
    """Two ranks with two readers each: all images are kept by the end, whoever decoded them, and the second stage has all."""
    words = (*TRAINED_TOWER, "store=ranks", "launch=torchrun", "launch.nproc=2", "launch.num_workers=2")
    found = trained(project, "ranks", *words, "launch.cache_pixels=true", "launch.micro_batch=2")
    (shelf,) = (project.root / "ranks/pixels").iterdir()
    assert count_images(shelf) == 12
    assert summary(found["finetune"])["pixels"]["hit_rate"] == 1.0
    assert summary(found["pretrain"])["pixels"]["reads"] > 0
    for name, stage in found.items():
        mine, theirs = weights(stage), weights(plain[name])
        assert all(torch.allclose(tensor, theirs[key], atol=1e-4) for key, tensor in mine.items())
