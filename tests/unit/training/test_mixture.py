"""Mixtures: how often an epoch has each sample, and where the images of several sources lie."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.builders import tiny_tokenizer
from tests.unit.stages.preparing import prepared
from tinylmm.data.image_folders import ImageFolder, ImageFolders
from tinylmm.data.images import open_image
from tinylmm.errors import DataError
from tinylmm.stages.job import make_job
from tinylmm.training.dataset import PreparedSamples
from tinylmm.training.sampler import Mixture, StepSampler


def epoch(mixture: Mixture, number: int, seed: int = 0) -> list[int]:
    return sorted(mixture.epoch(seed, number).tolist())


def test_weights_say_how_often_an_epoch_has_each_sample_of_a_source() -> None:
    mixture = Mixture([4, 6, 3], [1.0, 0.5, 2.0])
    assert len(mixture) == 4 + 3 + 6
    first, second = epoch(mixture, 0), epoch(mixture, 1)
    assert [i for i in first if i < 4] == [0, 1, 2, 3]
    assert [i for i in first if i >= 10] == [10, 10, 11, 11, 12, 12]
    assert sorted(i for i in first + second if 4 <= i < 10) == [4, 5, 6, 7, 8, 9]
    assert first == epoch(mixture, 0) and first != epoch(mixture, 0, seed=1)


def test_weights_between_whole_numbers_repeat_all_and_some() -> None:
    counts = np.bincount(Mixture([10], [2.3]).epoch(0, 0))
    assert len(Mixture([10], [2.3])) == 23 and sorted(counts) == [2] * 7 + [3] * 3


def steps(**options: Any) -> list[list[int]]:
    return list(StepSampler(8, 3, 4, 1.5, 0, 4, **options))


def test_one_source_at_weight_one_is_the_order_without_a_mixture() -> None:
    assert steps(pool=Mixture([8], [1.0]).epoch) == steps()


def test_a_mixtures_steps_are_its_epochs_in_an_order_of_the_seed() -> None:
    mixture = Mixture([4, 8], [1.0, 0.5])
    taken = [i for batch in steps(pool=mixture.epoch) for i in batch]
    assert sorted(taken[:8]) == epoch(mixture, 0)
    assert set(taken[8:]) <= set(epoch(mixture, 1)) and taken != sorted(taken)


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "png")
    return buffer.getvalue()


def made(root: Path, name: str, annotations: str, layout: str, **policy: Any) -> tuple[Path, dict[str, Any]]:
    """Output folder and summary of the stages that check and prepare one source below root/name."""
    fields = {"format": layout, "limit": None, "on_bad": "fail", "max_bad": 0, **policy}
    location = {"annotations": annotations, "images": "images", "how_to_get": "", **fields}
    settings = {"launch": {"num_workers": 0}, "location": {"root": str(root / name), "source": location}, "folders": {}}
    spec = {"template": "llama", "source": {**fields, "content": {}}}
    job = make_job(
        "prepare",
        name,
        "ab" * 32,
        spec,
        {"tokenizer": root / "tokenizer", "images": root / name / "images-stage" / "output"},
        settings,
        root / name / "work",
        root / "store",
    )
    job.output.mkdir(parents=True)
    return job.output, prepared(job)


def embedded(root: Path, name: str) -> Path:
    """Where the images lie that a source's records carried."""
    return root / name / "images-stage" / "output" / "embedded"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A LLaVA source and a parquet one, whose image a.png are different files."""
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name, colour in (("one", "red"), ("two", "blue")):
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "a.png").write_bytes(picture(colour))
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a red 3"}]
    records = [{"id": "1", "image": "a.png", "conversations": turns}, {"id": "2", "conversations": turns[1:] * 2}]
    records[1]["conversations"] = [{"from": "human", "value": "hi"}, turns[1]]
    (tmp_path / "one" / "a.json").write_text(json.dumps(records))
    said = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<image> what?"}]
    said += [{"role": "assistant", "content": "a 3"}]
    rows = [
        {"id": "p", "image": {"bytes": picture("green"), "path": None}, "messages": said},
        {"id": "q", "image": {"bytes": None, "path": "a.png"}, "messages": said},
        {"id": "r", "image": {"bytes": picture("green"), "path": None}, "messages": said},
        {"id": "bad", "image": {"bytes": b"no image", "path": None}, "messages": said},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "two" / "a.parquet")
    return tmp_path


def test_prepared_sources_are_mixed_with_each_samples_own_images(root: Path) -> None:
    one, _ = made(root, "one", "a.json", "llava")
    two, summary = made(root, "two", "a.parquet", "parquet", on_bad="skip", max_bad=1)
    assert (summary["samples"], summary["images"], summary["skipped"]) == (3, 2, 1)
    assert summary["skipped_records"][0]["reason"].startswith("the embedded image embedded:")
    assert len([path for path in embedded(root, "two").rglob("*") if path.is_file()]) == 1  # one content, one file
    samples = PreparedSamples([one, two], image_tokens=4, max_length=200)
    assert samples.sizes == [2, 3]
    places = [ImageFolder(root / name / "images", embedded(root, name)) for name in ("one", "two")]
    folders = ImageFolders(places)
    colours = {
        samples[i]["sample_id"]: [open_image(folders.find(name)).getpixel((0, 0)) for name in samples[i]["images"]]
        for i in range(5)
    }
    green, blue = (0, 128, 0), (0, 0, 255)
    assert colours == {"1": [(255, 0, 0)], "2": [], "p": [green], "q": [blue], "r": [green]}
    assert len(samples.images()) == 3
    assert "be brief USER:" in tiny_tokenizer().decode([i for i in samples[2]["input_ids"] if i >= 0])
    alone = PreparedSamples([two], image_tokens=4, max_length=200)
    assert "a.png" in alone.images() and ImageFolders(places[1:]).find("a.png") == root / "two/images/a.png"


def test_samples_that_the_length_drops_leave_their_own_source_only(root: Path) -> None:
    one, _ = made(root, "one", "a.json", "llava")
    two, _ = made(root, "two", "a.parquet", "auto", on_bad="skip", max_bad=1)
    full = PreparedSamples([one, two], image_tokens=4, max_length=500)
    samples = PreparedSamples([one, two], image_tokens=400, max_length=400)
    assert full.sizes == [2, 3] and samples.sizes == [1, 0] and samples.report.dropped == 4


def test_a_broken_embedded_image_stops_the_run_by_default(root: Path) -> None:
    with pytest.raises(DataError, match=r"record 3 \(id 'bad'\): the embedded image embedded:"):
        made(root, "two", "a.parquet", "parquet")
