"""The one internal sample, and the reader that makes it out of raw records (`data/records.py`).

What a record looks like is the source's `format`; `data/formats.py` reads each. A record that breaks a rule is handed on as a
`BadRecord` with the reason, so that the caller decides what becomes of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.formats import PARSERS, RecordFaultError, is_broken, kind, shown
from tinylmm.data.image_names import name_images, video_path
from tinylmm.data.records import read_records
from tinylmm.data.segments import Turn
from tinylmm.data.video_records import videos_as_images
from tinylmm.errors import printable


@dataclass(frozen=True)
class Sample:
    """One conversation.

    Attributes:
        sample_id: the record's `id` as text, or its index where it has none; need not be unique.
        turns: complete turns; `<image>` in a question is an image slot, as many as there are images.
        images: paths relative to the source's image folder, or names of embedded ones or of videos (`data/image_names.py`), in
            the order of their slots.
        system: the conversation's own system message; None leaves it to the chat template.
        greeted: the record began with an answer, which is left out.
        embedded: bytes of the embedded images by name.
    """

    sample_id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    system: str | None = None
    greeted: bool = False
    embedded: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: its 0-based position in the file, its id and the reason, both fit to be shown."""

    index: int
    sample_id: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "sample_id", printable(self.sample_id, keep=""))
        object.__setattr__(self, "reason", printable(self.reason, keep=""))


def read_samples(path: Path, layout: str = "llava", videos: bool = False) -> Iterator[Sample | BadRecord]:
    """Yield every record of an annotation file, in file order.

    Args:
        layout: the source's `format`.
        videos: as `parse_record`.

    Raises:
        DataError: as `read_records`.
    """
    for index, record in enumerate(read_records(path, layout)):
        yield parse_record(index, record, layout, videos)


def parse_record(index: int, record: Any, layout: str = "llava", videos: bool = False) -> Sample | BadRecord:
    """Turn one record into a sample, or say why it is none.

    Args:
        index: 0-based position in the file; stands in for a missing id.
        record: what the file held there, of any type.
        layout: the source's `format`.
        videos: a record with a video is a sample; else it is refused, as the run does not say which frames are shown.
    """
    given = record.get("id") if isinstance(record, dict) else None
    sample_id = str(index) if given is None else given if isinstance(given, str) else _id_text(given)
    try:
        if is_broken(sample_id):
            raise RecordFaultError("its `id` holds half a character (a lone surrogate escape)")
        return _parse(record, sample_id, layout, videos)
    except RecordFaultError as fault:
        return BadRecord(index, sample_id, str(fault))


def _id_text(given: Any) -> str:
    """An id that is no text, as text: a number as it is, anything else in short."""
    return str(given) if isinstance(given, (int, float, Decimal)) else shown(given)


def _parse(record: Any, sample_id: str, layout: str, videos: bool) -> Sample:
    if not isinstance(record, dict):
        raise RecordFaultError(f"the record is no object but {kind(record)}")
    conversation = PARSERS[layout](videos_as_images(record))
    images, embedded = name_images(conversation.images)
    if not videos and any(video_path(name) is not None for name in images):
        raise RecordFaultError(
            "the record has a video, and nothing says which frames of it to show: set video.sampling={uniform: 16}, or another"
        )
    slots = sum(turn.num_images for turn in conversation.turns)
    if slots != len(images):
        raise RecordFaultError(f"its questions have {slots} {IMAGE_SLOT} but the record names {len(images)} images")
    return Sample(sample_id, conversation.turns, images, conversation.system, conversation.greeted, embedded)
