"""One model that answers requests: what a request is made into, and how many may be answered or wait at a time."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from tinylmm.config.video import SamplingSpec
from tinylmm.constants import Extent
from tinylmm.errors import UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.continuous import ContinuousEngine
from tinylmm.generation.session import ChatModel, TooLongError
from tinylmm.serving.answers import Answers, Asked
from tinylmm.serving.errors import ApiError, wrong
from tinylmm.serving.fetch import Fetcher
from tinylmm.serving.images import ImageShelf, key_of
from tinylmm.serving.media import Media
from tinylmm.serving.messages import Conversation
from tinylmm.serving.metrics import Metrics
from tinylmm.serving.options import MB, ServeOptions
from tinylmm.serving.videos import VideoLimits
from tinylmm.serving.worker import EngineWorker

READERS = 2
"""Threads that read requests and decode images."""


class Service:
    """A model with its engine's thread.

    Args:
        name: what clients call it.
    """

    def __init__(self, chat: ChatModel, name: str, options: ServeOptions) -> None:
        self.chat, self.name, self.options = chat, name, options
        engine = ContinuousEngine(
            chat.model, chat.prompts.ends, options.rows, options.tokens, options.kept_tokens, options.kept_images
        )
        self.worker = EngineWorker(engine)
        self.readers = ThreadPoolExecutor(READERS, "reader")
        self.fetcher = Fetcher(options.allow_images_from, options.image_s, int(options.body_mb * MB))
        videos = VideoLimits(options.max_frames, options.max_pixels, options.video_s)
        self.shelf = ImageShelf(chat.transform, options.kept_images, options.max_pixels, videos)
        self.metrics = Metrics(engine, lambda: max(0, self._taken - engine.answering))
        self.began = int(time.time())
        self._taken = 0
        self._seconds = 1.0
        self._rendering = threading.Lock()

    def start(self) -> None:
        """Begin to answer."""
        self.worker.start()

    def close(self) -> None:
        """End; answers that are not complete fail."""
        self.readers.shutdown(wait=True, cancel_futures=True)
        self.worker.close()

    @contextmanager
    def places(self, count: int) -> Iterator[None]:
        """Hold places among those who are answered or wait.

        Raises:
            ApiError: there are not enough (429).
        """
        most = self.options.rows + self.options.queue
        if count > most:
            raise wrong(f"n is {count}; this server has {most} places in all.", "n")
        if self._taken + count > most:
            wait = max(1, math.ceil(self._seconds * self.options.queue / self.options.rows))
            text = f"{self._taken} answers are being written or wait for their turn, and {most} may. Come again later."
            raise ApiError(429, text, None, "queue_full", {"Retry-After": str(min(wait, 60))})
        self._taken += count
        began = time.monotonic()
        try:
            yield
            self._seconds += 0.1 * (time.monotonic() - began - self._seconds)
        finally:
            self._taken -= count

    async def prepare(self, conversation: Conversation, sampling: SamplingSpec | None = None) -> Asked:
        """Have a conversation's images and videos at hand, decode them and make its prompt, beside the event loop.

        Args:
            sampling: the frames that are shown of videos; by default those that the model was trained with.

        Raises:
            ApiError: an image is not to be had or cannot be read, or the prompt does not fit the model's context.
        """
        count = sum(len(said.images) for said in conversation.questions)
        if count > self.options.max_images:
            raise wrong(
                f"the request has {count} images; this server takes {self.options.max_images} at most, videos counted in.",
                "messages",
            )
        files = await self.fetcher.files(conversation)
        frames = sampling or self.chat.loaded.description.sampling
        return await asyncio.get_running_loop().run_in_executor(
            self.readers, self._prepare, conversation, files, frames
        )

    def _prepare(
        self, conversation: Conversation, files: Sequence[Sequence[Media]], frames: SamplingSpec | None
    ) -> Asked:
        """Args: files: of each question, its images and videos."""
        images = self.shelf.prepare([file for some in files for file in some], frames)
        sizes: dict[str, Extent] = {key: image.size for key, image in images.items()}
        texts = [said.text for said in conversation.questions]
        questions = [(text, [key_of(file, frames) for file in some]) for text, some in zip(texts, files, strict=True)]
        try:
            with self._rendering:  # a tokenizer serves one thread at a time
                prompt = self.chat.prompt("", questions, conversation.answers, conversation.system, sizes)
        except TooLongError as error:
            raise wrong(str(error), "messages", "context_length_exceeded") from None
        except UserError as error:
            raise wrong(str(error), "messages") from None
        tokens = sum(self.chat.model.tokens_of(*sizes[key]) for key in prompt.images)
        return Asked(prompt, {key: image.pixels for key, image in images.items()}, sizes, tokens)

    def ask(
        self, asked: Asked, samplings: Sequence[Sampling], stops: Sequence[str] = (), alternatives: int | None = None
    ) -> Answers:
        """Have a question answered, once for each sampling."""
        return Answers(self.worker, self.chat.prompts, asked, samplings, stops, alternatives)
