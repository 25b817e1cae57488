"""What a server is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass

from tinylmm.constants import MAX_PIXELS
from tinylmm.errors import UserError

MB = 1_000_000


@dataclass(frozen=True)
class ServeOptions:
    """Limits of a server and of every request.

    Attributes:
        rows: most answers at a time.
        queue: most answers that wait for their turn; more are told to come again (429).
        tokens: most tokens (prompt and answer) of all answers at a time.
        kept_tokens: most tokens of earlier prompts and answers that are not computed again when a request repeats them.
        kept_images: images that are not decoded and encoded again.
        max_new_tokens: an answer's length where the request names none.
        max_choices: most answers to one request (`n`).
        max_images: most images and videos of a request.
        max_pixels: most pixels of a request's images together, and of the frames of its videos.
        max_frames: most frames that a request's videos show together.
        video_s: seconds that decoding a request's videos may take.
        body_mb: most megabytes of a request.
        read_s: seconds in which a request's body must arrive, and each piece of a stream be taken.
        drain_s: seconds that answers may still take once the server was told to stop.
        allow_images_from: hosts that images and videos named by http address are fetched from (`fetch.ImageHosts`); none
            means that nothing is fetched.
        image_s: seconds that such a file may take. All of a request's together have at most `body_mb`.

    Raises:
        UserError: one is out of range.
    """

    rows: int = 32
    queue: int = 128
    tokens: int = 32768
    kept_tokens: int = 32768
    kept_images: int = 64
    max_new_tokens: int = 512
    max_choices: int = 8
    max_images: int = 16
    max_pixels: int = MAX_PIXELS
    max_frames: int = 64
    video_s: float = 20
    body_mb: float = 32
    read_s: float = 60
    drain_s: float = 30
    allow_images_from: tuple[str, ...] = ()
    image_s: float = 10

    def __post_init__(self) -> None:
        may_be_none = {"queue", "kept_tokens", "kept_images", "max_images"}
        for name, value in vars(self).items():
            least = 0 if name in may_be_none else 1
            if isinstance(value, int) and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more.")
            if isinstance(value, float) and not 0 < value < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {value}; it must be above 0.")
        if self.max_pixels > MAX_PIXELS:
            raise UserError(f"--max-pixels is {self.max_pixels}; at most {MAX_PIXELS:,}.")
