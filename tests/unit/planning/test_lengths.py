"""Lengths of prepared samples are what the training itself finds; of others, what a table assumes."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
import numpy as np
import pytest

from tests.builders import record
from tinylmm.config.video import SamplingSpec
from tinylmm.constants import IMAGE_TOKEN_ID as SLOT
from tinylmm.data.clip_list import write_clips
from tinylmm.planning.lengths import ClipTokens, Prepared, assumed_lengths, read_lengths
from tinylmm.sizing.layers import UnknownShapeError
from tinylmm.training.dataset import PreparedSamples

Q, MAX = 9, 40


def prepared(folder: Path, lengths: list[int], images: int) -> Path:
    """What a prepare stage leaves: so many tokens, and so many slots before them."""
    rows = [
        record(f"{folder.name}-{n}", [1, *[SLOT] * images, *[5] * n], 2 + images, tuple(map(str, range(images))))
        for n in lengths
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "samples"))
    return folder


def test_lengths_are_those_that_the_training_counts(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "one", [10, 20, 30, 32], 1)
    found = read_lengths([Prepared(folder, 1.0, 3.0)], Q, MAX)
    trained = PreparedSamples([folder], Q, MAX)
    assert (found.samples, found.read) == (len(trained), True)
    assert found.tokens * 4 == trained.report.tokens
    lengths = np.minimum(1 + Q + np.array([10, 20, 30, 32]), MAX)
    assert found.deviation == pytest.approx(lengths.std()) and found.squared == pytest.approx((lengths**2).mean())
    assert (found.supervised, found.images) == (3.0, 1.0)


def test_a_mixture_counts_each_source_by_its_weight(tmp_path: Path) -> None:
    text, shown = prepared(tmp_path / "text", [10] * 4, 0), prepared(tmp_path / "shown", [10] * 4, 1)
    found = read_lengths([Prepared(text, 0.5, 4.0), Prepared(shown, 2.0, 9.0)], Q, MAX)
    assert found.samples == 2 + 8
    assert found.images == pytest.approx(0.8)
    assert found.tokens == pytest.approx(11 + 0.8 * Q)
    assert found.supervised == pytest.approx(0.2 * 4 + 0.8 * 9)


def test_damaged_samples_are_named(tmp_path: Path) -> None:
    folder = prepared(tmp_path / "one", [10, 20], 1)
    (file,) = (folder / "samples").glob("*.arrow")
    file.write_bytes(b"half a file")
    with pytest.raises(UnknownShapeError, match=re.escape(str(file))):
        read_lengths([Prepared(folder, 1.0, 3.0)], Q, MAX)


def test_what_nobody_has_prepared_is_assumed_and_cut_like_it() -> None:
    known = assumed_lengths("llava_v1_5", {"pretrain": 1.0}, True, 729, 2048)
    assert (known.samples, known.tokens, known.read) == (558128, 729 + 45, False)
    assert assumed_lengths("llava_v1_5", {"pretrain": 1.0}, True, 729, 512).tokens == 512
    mine = assumed_lengths("mine", {"pretrain": 1.0}, False, 10, 2048)
    assert (mine.samples, mine.images) == (None, 1.0)
    mixed = assumed_lengths("llava_v1_5", {"pretrain": 1.0, "finetune": 0.5}, False, 729, 2048)
    assert mixed.samples == round(558128 + 665298 / 2)


@pytest.mark.parametrize("tokens", [ClipTokens(fixed=7), ClipTokens(a_frame=3)])
def test_clips_are_counted_by_the_frames_that_are_shown(tmp_path: Path, tokens: ClipTokens) -> None:
    folder = tmp_path / "prepared"
    shown = {"video:a.mp4": (0, 1), "video:b.mp4": (0, 2, 4, 6)}
    rows = [
        record("one", [1, SLOT, 5], 1, ("video:a.mp4",)),
        record("both", [1, SLOT, 5, SLOT], 1, ("a.png", "video:b.mp4")),
        record("text", [1, 5], 1),
    ]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "samples"))
    (tmp_path / "checked").mkdir()
    write_clips(tmp_path / "checked", shown)

    def positions(name: str) -> int:
        frames = len(shown.get(name, ()))
        return tokens.fixed + frames * tokens.a_frame if frames else Q

    found = read_lengths([Prepared(folder, 1.0, 1.0, tmp_path / "checked")], Q, MAX, tokens)
    assert found.tokens * 3 == PreparedSamples([folder], positions, MAX).report.tokens
    assert (found.images * 3, found.clips * 3, found.frames * 3) == (1, 2, 6)


def test_the_published_clips_are_assumed_to_be_of_half_a_minute() -> None:
    found = [
        assumed_lengths(
            "tinyllava_video", {"finetune": 1.0}, False, 729, 3072, ClipTokens(512), SamplingSpec(**sampling)
        )
        for sampling in ({"uniform": 16}, {"fps": 1}, {"fps": 2, "max": 40})
    ]
    assert [row.frames for row in found] == [16, 30, 40] and {row.clips for row in found} == {1.0}
    assert {(row.samples, row.tokens) for row in found} == {(491000, 80 + 512)}
