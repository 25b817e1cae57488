"""Real video files, written by PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

WIDTH, HEIGHT = 64, 48
MILLISECOND = Fraction(1, 1000)


def picture(number: int, frames: int) -> np.ndarray:
    """Frame `number` of `frames` (H, W, 3): red grows with time, a blue square moves, the upper left is green."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, :, 0] = number * 200 // max(1, frames - 1)
    pixels[: HEIGHT // 2, : WIDTH // 2, 1] = 200
    pixels[28:40, number * 3 % 52 : number * 3 % 52 + 12, 2] = 255
    return pixels


def write_video(
    path: Path,
    frames: int,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    rotation: float = 0,
    container: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write a clip of 25 frames a second, or with each frame at its time in milliseconds; `options` are the codec's.

    Args:
        rotation: degrees counterclockwise that a player turns it by.
        container: options of the container.
    """
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.gop_size = 12
        if times is not None:
            stream.codec_context.time_base = stream.time_base = MILLISECOND
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, frames), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, 25) if times is None else MILLISECOND
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a second of silence."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def moved_to_front(path: Path, source: Path) -> Path:
    """Write an MP4 file again with its index in front, as files for the network have it."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as output, av.open(str(source)) as file:
        stream = output.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                output.mux(packet)
    return path


def decode_all(path: Path) -> list[Image.Image]:
    """Every frame of a file, as stored, one after the other."""
    with av.open(str(path)) as file:
        return [frame.to_image() for frame in file.decode(video=0)]
