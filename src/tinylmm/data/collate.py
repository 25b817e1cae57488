"""From prepared samples to a batch: image slots expanded, samples packed into rows, targets shifted.

Shapes: R rows, L positions a row, N images. Several samples share a row, told apart by positions that restart at 0 and
by segment ids; neither attention nor loss crosses from one sample to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.data.slots import expand, learned_within, positions_of
from tinylmm.errors import DataError

ROW_LENGTHS_TRIED = 8
ROW_MULTIPLE = 8
"""Row lengths are multiples of this: matrix kernels for half precision work best so."""


ImageTokens = int | Callable[[str], int]
"""Positions that an image takes: the same for all, or by its path where images are tiled."""


def image_widths(record: Mapping[str, Any], image_tokens: ImageTokens) -> list[int]:
    """Return how many positions each image slot of a prepared sample takes, in their order.

    Raises:
        DataError: slots and images differ in number.
    """
    slots, images = record["input_ids"].count(IMAGE_TOKEN_ID), record["images"]
    if slots != len(images):
        raise DataError(
            f"sample '{record['sample_id']}': {slots} image slots but {len(images)} images. Prepare the data again."
        )
    return [image_tokens] * slots if isinstance(image_tokens, int) else [image_tokens(path) for path in images]


def sample_length(record: Mapping[str, Any], image_tokens: ImageTokens, max_length: int) -> int:
    """Return how many tokens a prepared sample has in a row: its images expanded, cut at `max_length`."""
    widths = image_widths(record, image_tokens)
    return min(len(record["input_ids"]) + sum(widths) - len(widths), max_length)


def supervised_after_cut(record: Mapping[str, Any], image_tokens: ImageTokens, max_length: int) -> int:
    """Return how many tokens of a prepared sample are trained on once it is cut at `max_length` (`slots.learned_within`)."""
    positions = positions_of(record["input_ids"], image_widths(record, image_tokens))
    return learned_within(record["labels"], positions, max_length)


def kept_after_cut(input_ids: Sequence[int], widths: Sequence[int], max_length: int) -> tuple[int, int]:
    """Return how many images and positions of a sample are left once it is cut at `max_length`.

    An image that the cut would halve goes whole: nothing that is learnt stands behind it, and nothing before it sees it, so the
    loss is that of the originals, which keep the half.
    """
    images = start = 0
    for token, width in zip(input_ids, widths, strict=True):
        if start + width > max_length:
            return images, start if token == IMAGE_TOKEN_ID else max_length
        images += token == IMAGE_TOKEN_ID
        start += width
    return images, start


@dataclass(frozen=True)
class _Piece:
    """One sample, expanded, cut and shifted; `images` are those whose slots are in it."""

    sample_id: str
    input_ids: list[int]
    targets: list[int]
    images: list[str]


class Collator:
    """Makes one batch out of prepared samples; the same samples in the same order always give the same batch.

    Args:
        image_tokens: positions that an image takes: the connector's output length Q, or path -> positions.
        pad_id: any id that the LLM can embed; padding carries no loss and is a segment of its own.
        row_tokens: a row is filled up with samples to at most so many positions; a longer sample has its own row.
        packing: False gives every sample a row.
        image: relative path -> pixels (3, H, W); None gives paths alone, for features that were computed before.
        max_length: a sample is cut from the right to so many positions.
        size: where images are tiled, relative path -> width and height; `image` then gives tiles, (T, 3, H, W).
        frames: where there are clips, name -> how many frames it has, 0 for an image; `image` then gives frames of clips,
            (T, 3, H, W).
    """

    def __init__(
        self,
        image_tokens: ImageTokens,
        pad_id: int,
        row_tokens: int,
        packing: bool,
        image: Callable[[str], torch.Tensor] | None,
        max_length: int,
        size: Callable[[str], tuple[int, int]] | None = None,
        frames: Callable[[str], int] | None = None,
    ) -> None:
        if min(image_tokens if isinstance(image_tokens, int) else 1, row_tokens, max_length) < 1 or pad_id < 0:
            raise ValueError(
                f"{image_tokens=}, {row_tokens=}, {max_length=} must be positive and {pad_id=} not negative"
            )
        self.image_tokens = image_tokens
        self.pad_id = pad_id
        self.row_tokens = row_tokens
        self.packing = packing
        self.image = image
        self.max_length = max_length
        self.size = size
        self.frames = frames

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate samples with `sample_id`, `input_ids`, `labels`, `images`; none at all give one row of padding.

        Returns:
            input_ids (R, L) int64: token ids, every position of an image IMAGE_TOKEN_ID.
            position_ids (R, L) int64: restart at 0 with every sample and with the padding behind them.
            targets (R, L) int64: the next token of the same sample where it is supervised, else IGNORE_INDEX.
            segment_ids (R, L) int64: number of the sample in its row; padding has the next one.
            image_paths: N relative paths in the order of their slots, row by row.
            pixel_values (N, 3, H, W) in the same order; None if the batch has no image or the collator no `image`.
            image_sizes (N, 2) int64, width and height; only where images are tiled, and N in pixel_values is then tiles.
            frames (N,) int64, of each clip, 0 for an image; only where there are clips, and N in pixel_values is then views.
            sample_ids: in the order in which the samples lie in the rows. num_samples: how many there are.

        Raises:
            DataError: a sample's slots and images differ in number.
        """
        rows = self._rows([self._piece(sample) for sample in samples]) or [[]]
        batch = self._tensors(rows)
        pieces = [piece for row in rows for piece in row]
        paths = [path for piece in pieces for path in piece.images]
        batch["image_paths"] = paths
        batch["pixel_values"] = None
        if self.image is not None and paths:
            pixels = {path: self.image(path) for path in dict.fromkeys(paths)}
            views = [one if one.dim() == 4 else one[None] for one in (pixels[path] for path in paths)]
            batch["pixel_values"] = torch.cat(views)
        if self.size is not None and paths:
            batch["image_sizes"] = torch.tensor([self.size(path) for path in paths])
        if self.frames is not None and paths:
            batch["frames"] = torch.tensor([self.frames(path) for path in paths])
        batch["sample_ids"] = [piece.sample_id for piece in pieces]
        batch["num_samples"] = len(pieces)
        return batch

    def _piece(self, sample: Mapping[str, Any]) -> _Piece:
        widths = positions_of(sample["input_ids"], image_widths(sample, self.image_tokens))
        images, end = kept_after_cut(sample["input_ids"], widths, self.max_length)
        ids = expand(sample["input_ids"], widths)[:end]
        labels = expand(sample["labels"], widths)[:end]
        targets = [*labels[1:], IGNORE_INDEX]
        return _Piece(sample["sample_id"], ids, targets, list(sample["images"][:images]))

    def _rows(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Pack at the row length, up to `row_tokens`, that leaves the least padding; the shorter one where two are equal.

        Two samples of 200 tokens waste a row of 320 each, and fit a row of 400 together.
        """
        if not self.packing or not pieces:
            return [[piece] for piece in pieces]
        longest = max(len(piece.input_ids) for piece in pieces)
        lengths = np.linspace(longest, max(longest, self.row_tokens), ROW_LENGTHS_TRIED).astype(int).tolist()
        packings = [_first_fit_decreasing(pieces, length) for length in dict.fromkeys(lengths)]
        return min(packings, key=lambda rows: len(rows) * _padded_length(rows))

    def _tensors(self, rows: list[list[_Piece]]) -> dict[str, Any]:
        length = _padded_length(rows)
        shape = (len(rows), length)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        targets = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        segment_ids = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            start = 0
            for segment, piece in enumerate(row):
                end = start + len(piece.input_ids)
                input_ids[number, start:end] = torch.tensor(piece.input_ids)
                targets[number, start:end] = torch.tensor(piece.targets)
                position_ids[number, start:end] = torch.arange(end - start)
                segment_ids[number, start:end] = segment
                start = end
            position_ids[number, start:] = torch.arange(length - start)
            segment_ids[number, start:] = len(row)
        return {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "targets": targets,
            "segment_ids": segment_ids,
        }


def _padded_length(rows: list[list[_Piece]]) -> int:
    """Length that every row is padded to: the longest row's, rounded up to ROW_MULTIPLE."""
    longest = max(1, *(sum(len(piece.input_ids) for piece in row) for row in rows))
    return -(-longest // ROW_MULTIPLE) * ROW_MULTIPLE


def _first_fit_decreasing(pieces: list[_Piece], row_tokens: int) -> list[list[_Piece]]:
    """The longest sample first, each into the first row that has room."""
    rows: list[list[_Piece]] = []
    room: list[int] = []
    for piece in sorted(pieces, key=lambda piece: -len(piece.input_ids)):  # stable: ties keep their order
        length = len(piece.input_ids)
        row = next((number for number, free in enumerate(room) if length <= free), None)
        if row is None:
            rows.append([piece])
            room.append(row_tokens - length)
        else:
            rows[row].append(piece)
            room[row] -= length
    return rows
