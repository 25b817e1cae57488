"""The embedded video data set: parades of real handwritten digits as MP4 files, with their records in LLaVA's format.

Files under the output folder:

| file | content |
|---|---|
| images/*.png | single frames, for the vision tower |
| videos/{train,test}/*.mp4 | clips of 32 x 32 pixels and two to four seconds, H.264 |
| frames.json | image + what it shows |
| pretrain.json | clip + which digits come, and which way each goes |
| finetune.json | the same clips + questions that need time, in turns |
| text.json | conversations over clips told frame by frame, no videos: for the LLM and the tokenizer |
| test.jsonl | questions over clips of digits by writers that occur in none of the other files |

The frames that are drawn depend on seed and options alone. The bytes of the MP4 files are the encoder's too: the same FFmpeg
writes the same ones, another may not. So a stage's digest covers seed and options, and the manifest keeps the encoder.
"""

from __future__ import annotations

import json
import logging
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from PIL import Image

from tinylmm.constants import IMAGE_SLOT
from tinylmm.data.embedded import checked_counts, conversation, write_json
from tinylmm.data.parades import (
    RATE,
    Parade,
    ask,
    askable,
    description,
    frame_caption,
    moves,
    render,
    sample_glimpse,
    sample_parade,
)
from tinylmm.data.scenes import Question, Rng, Scans
from tinylmm.data.video_records import VIDEO_SLOT
from tinylmm.errors import UserError

log = logging.getLogger(__name__)

RECORDS = {"frames": 6000, "clips": 2500, "text": 6000, "test": 200}
"""Records by default; `options` of the data set's `build` may change any of them. Each clip is in two files."""
CODEC = "libx264"
CODEC_OPTIONS = {"crf": "18", "preset": "ultrafast"}
CAPTION_REQUESTS = ("what moves?", "what do you see?", "what is in the video?")
FRAME_REQUEST = "what is in the picture?"
LISTING_REQUEST = "list the moves."
STEPS = (8, 9)
"""Frames of the shortest and of the longest clip in words."""


class RecordCounts(TypedDict, total=False):
    """Single frames, clips to train on, clips in words, clips to be asked about."""

    frames: int
    clips: int
    text: int
    test: int


def build_moving_digits(output: Path, seed: int, **options: Unpack[RecordCounts]) -> dict[str, Any]:
    """Write the data set.

    Args:
        output: existing folder; leftovers of an earlier try are overwritten.
        seed: seed of everything; what a record holds depends on (seed, part, index) alone.
        options: number of records by part, over `RECORDS`.

    Returns:
        Number of records by file, of videos, and which encoder wrote them.

    Raises:
        ConfigError: an option has an unknown name or is not a positive whole number.
        UserError: PyAV is not installed.
    """
    counts = checked_counts(options, RECORDS, "moving digits")
    av = _av()
    train, held_out = Scans("train"), Scans("held_out")
    frames = [_frame(index, seed, train, output) for index in range(counts["frames"])]
    clips = [_clip("clips", index, seed, train, output / "videos/train") for index in range(counts["clips"])]
    lines = [line for index in range(counts["test"]) for line in _tested(index, seed, held_out, output)]
    written = {
        "frames.json": write_json(output / "frames.json", frames),
        "pretrain.json": write_json(output / "pretrain.json", (_captioned(*clip) for clip in clips)),
        "finetune.json": write_json(output / "finetune.json", (_questioned(*clip) for clip in clips)),
        "text.json": write_json(output / "text.json", (_told(index, seed, train) for index in range(counts["text"]))),
        "test.jsonl": len(lines),
    }
    (output / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    log.info("wrote %s", ", ".join(f"{name} ({count} records)" for name, count in written.items()))
    encoder = {
        "codec": CODEC,
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }
    return {
        "records": written,
        "videos": counts["clips"] + counts["test"],
        "images": counts["frames"],
        "encoder": encoder,
    }


def write_clip(path: Path, frames: np.ndarray, rate: int = RATE) -> None:
    """Write frames (T, H, W, 3) uint8 as an MP4 file; the same FFmpeg writes the same bytes.

    Raises:
        UserError: PyAV is not installed.
    """
    av = _av()
    with av.open(str(path), "w", format="mp4") as file:
        stream = file.add_stream(CODEC, rate=rate, options=CODEC_OPTIONS)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "moving digits are written by PyAV, which is not installed here. Install it with `pip install 'tinylmm[video]'`."
        ) from error
    return av


def _rng(seed: int, part: str, index: int) -> Rng:
    return np.random.default_rng([seed, list(RECORDS).index(part), index])


def _frame(index: int, seed: int, scans: Scans, output: Path) -> dict[str, Any]:
    """Write a random frame of a clip of its own."""
    rng = _rng(seed, "frames", index)
    parade, time = sample_glimpse(rng, scans)
    name = f"{index:06d}.png"
    (output / "images").mkdir(exist_ok=True)
    Image.fromarray(render(parade, scans, rng, (time,))[0]).save(output / "images" / name, compress_level=1)
    turns = [(f"{IMAGE_SLOT}\n{FRAME_REQUEST}", frame_caption(parade, time))]
    return {"id": f"frame-{index:06d}", "image": name, "conversations": conversation(turns)}


def _clip(part: str, index: int, seed: int, scans: Scans, folder: Path) -> tuple[str, Parade, Rng]:
    """Draw and write a clip; return its path below videos/, what it shows and the generator to go on with."""
    rng = _rng(seed, part, index)
    parade = sample_parade(rng, scans)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{index:06d}.mp4"
    write_clip(path, render(parade, scans, rng))
    return f"{folder.name}/{path.name}", parade, rng


def _captioned(path: str, parade: Parade, rng: Rng) -> dict[str, Any]:
    request = CAPTION_REQUESTS[rng.integers(len(CAPTION_REQUESTS))]
    turns = [(f"{VIDEO_SLOT}\n{request}", moves(parade))]
    return {"id": f"pretrain-{Path(path).stem}", "video": path, "conversations": conversation(turns)}


def _questioned(path: str, parade: Parade, rng: Rng) -> dict[str, Any]:
    turns = _turns(parade, rng)
    turns[0] = (f"{VIDEO_SLOT}\n{turns[0][0]}", turns[0][1])
    return {"id": f"finetune-{Path(path).stem}", "video": path, "conversations": conversation(turns)}


def _told(index: int, seed: int, scans: Scans) -> dict[str, Any]:
    rng = _rng(seed, "text", index)
    parade = sample_parade(rng, scans)
    turns = _turns(parade, rng)
    told = description(parade, int(rng.integers(STEPS[0], STEPS[1] + 1)))
    turns[0] = (f"{told}\n{turns[0][0]}", turns[0][1])
    return {"id": f"text-{index:06d}", "conversations": conversation(turns)}


def _tested(index: int, seed: int, scans: Scans, output: Path) -> list[dict[str, Any]]:
    path, parade, rng = _clip("test", index, seed, scans, output / "videos/test")
    return [
        {
            "question_id": f"{index:06d}-{question.category}",
            "video": path,
            "text": question.text,
            "category": question.category,
            "answer": question.answer,
            "options": question.options,
        }
        for question in (ask(category, parade, rng) for category in askable(parade))
    ]


def _turns(parade: Parade, rng: Rng) -> list[tuple[str, str]]:
    """Every question that can be asked, and the listing, in random order."""
    categories = askable(parade)
    questions: list[Question] = [ask(categories[index], parade, rng) for index in rng.permutation(len(categories))]
    # A direction more, of any digit: nothing else that is asked names as many.
    questions.insert(int(rng.integers(len(questions) + 1)), ask("direction", parade, rng))
    turns = [(question.text, question.answer) for question in questions]
    turns.insert(int(rng.integers(len(turns) + 1)), (LISTING_REQUEST, moves(parade)))
    return turns
