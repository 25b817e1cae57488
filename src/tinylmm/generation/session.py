"""Talk to a trained model from Python: one question, a conversation, a stream, a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinylmm.constants import IMAGE_SLOT, Extent
from tinylmm.data.chat import Turn, get_template
from tinylmm.data.slots import question
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import UserError
from tinylmm.generation.choose import Sampling
from tinylmm.generation.engine import Engine
from tinylmm.generation.images import EncodedImages
from tinylmm.generation.inputs import (
    Clip,
    Exchange,
    History,
    ImageInput,
    Images,
    as_list,
    conversation,
    decode,
    in_order,
)
from tinylmm.generation.prompts import Prompt, PromptMaker
from tinylmm.generation.text import Pieces
from tinylmm.models.attention import choose_attention
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.devices import DTYPES, named_device, precision_on, to_precision
from tinylmm.store.find_model import find_model

KEPT_FEATURES = 32
"""Images whose tower features are kept, so that a conversation encodes its image once."""


class TooLongError(UserError):
    """A prompt leaves no room for an answer in the model's context."""


def load(
    where: str | Path,
    device: str | torch.device = "auto",
    dtype: str = "auto",
    trust: Sequence[str] = (),
    store: str | Path | None = None,
    attention: str = "auto",
) -> ChatModel:
    """Load a model to talk to.

    Args:
        where: a model folder, a stage or run folder of the store, or the name of a run.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" or "mps"; or a torch.device.
        dtype: "auto" (bf16 on a GPU, fp32 on the CPU), "fp32", "bf16" or "fp16".
        trust: packages besides tinylmm and transformers whose classes the model may be made of.
        store: where runs are looked for by name.
        attention: "auto" (flash-attn where it is installed and can compute this), or "sdpa".

    Raises:
        UserError: there is no such model, device or dtype.
        IntegrityError: files of the model are missing or damaged.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype is '{dtype}'; allowed: auto, {', '.join(DTYPES)}.")
    target = named_device(str(device))
    folder = find_model(where, None if store is None else Path(store))
    precision = precision_on(target, dtype)
    loaded = load_model(folder, list(trust))
    to_precision(loaded.model, target, DTYPES[precision])
    loaded.model.set_attention(choose_attention(attention, precision, target))
    return ChatModel(loaded)


@dataclass(frozen=True)
class _Loaded:
    """Images and videos that prompts come with, by key: pixels as the tower takes them, and what `tokens_of` asks."""

    pixels: dict[str, Tensor] = field(default_factory=dict)
    sizes: dict[str, Extent] = field(default_factory=dict)


class ChatModel:
    """A loaded model that answers; greedy unless sampling options say otherwise.

    Options of `chat`, `stream` and `chat_batch`: the fields of `Sampling` (max_new_tokens, temperature, top_p, top_k,
    repetition_penalty, seed).
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model = loaded.model.eval()
        self.tokenizer = loaded.tokenizer
        self.prompts = PromptMaker(get_template(self.model.template), self.tokenizer)
        self.transform = ImageTransform.of(loaded.description.image)
        self._features = EncodedImages(self.model, keep=KEPT_FEATURES)

    def chat(
        self, prompt: str | Sequence[str], image: Any = None, history: Any = (), video: Any = None, **options: Any
    ) -> Any:
        """Answer one prompt, or a list of prompts (then see `chat_batch`, whose lists `image`, `history` and `video` are).

        Args:
            prompt: the question. Images come in front of it, or where it says `<image>`, once for each.
            image: None, an image, or a list of images: what `inputs.ImageInput` names.
            video: None, or a video: a file's path or content, or a list of frames, alone or as (frame, seconds); several as
                a list of `inputs.Video`, which also says which frames are shown. It stands behind the images, or where the
                prompt says `<video>`.
            history: what was said before, oldest first: `Exchange`s, (question, answer) pairs, or OpenAI's messages.
            options: see the class.

        Returns:
            The answer, without surrounding white space.

        Raises:
            UserError: images and `<image>` slots differ in number, the prompt does not fit the model's context, an image
                or the history is of an unknown form, or an option is unknown.
            DataError: an image cannot be read.
        """
        if not isinstance(prompt, str):
            return self.chat_batch(prompt, image, history or None, videos=video, **options)
        return self.chat_batch([prompt], [image], [history], videos=[video], **options)[0]

    def chat_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Images] | None = None,
        histories: Sequence[History] | None = None,
        batch_size: int = 8,
        videos: Sequence[Any] | None = None,
        **options: Any,
    ) -> list[str]:
        """Answer many prompts, `batch_size` at once; in fp32 the answers are those of single calls.

        Args:
            prompts: questions.
            images: for each prompt what `chat` takes; None for no images at all.
            histories: for each prompt what `chat` takes; None for none.
            batch_size: prompts that are generated together.
            videos: for each prompt what `chat` takes; None for none.
            options: see the class.

        Raises:
            UserError, DataError: as `chat`; or the lists differ in length.
        """
        images = [None] * len(prompts) if images is None else images
        histories = [()] * len(prompts) if histories is None else histories
        videos = [None] * len(prompts) if videos is None else videos
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size is {batch_size!r}; it must be a whole number of 1 or more.")
        if not isinstance(images, list | tuple) or not len(prompts) == len(images) == len(histories) == len(videos):
            raise UserError(
                f"{len(prompts)} prompts need as many entries in images, videos and histories (one list each; None for none)."
            )
        sampling = Sampling.of(options)
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):  # no more images in memory than are asked about at once
            loaded = _Loaded()
            rows = range(first, min(first + batch_size, len(prompts)))
            shown = [in_order(prompts[i], images[i], videos[i]) for i in rows]
            asked = [
                self._prepare(str(i), *with_it, histories[i], loaded) for i, with_it in zip(rows, shown, strict=True)
            ]
            replies = self._engine(loaded, sampling, batch_size).replies(asked)
            answers = {reply.item_id: reply.ids for batch in replies for reply in batch}
            texts += [self.prompts.text(answers[prompt.item_id]).strip() for prompt in asked]
        return texts

    def stream(
        self, prompt: str, image: Images = None, history: History = (), video: Any = None, **options: Any
    ) -> Iterator[str]:
        """Yield the answer of `chat` in pieces as it is written; joined, they are that answer.

        Args, Raises: as `chat`, and errors come before the first piece.
        """
        loaded = _Loaded()
        asked = self._prepare("", *in_order(prompt, image, video), history, loaded)
        return self._pieces(self._engine(loaded, Sampling.of(options)).stream(asked))

    def conversation(self, image: Images = None, video: Any = None) -> Conversation:
        """Begin a conversation; its first question comes with the image, or the video, or both."""
        return Conversation(self, in_order("", image, video)[1])

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        pieces = Pieces(self.prompts.text)
        for token in tokens:
            if piece := pieces.add(token):
                yield piece
        if piece := pieces.finish():
            yield piece

    def _engine(self, loaded: _Loaded, sampling: Sampling, rows: int = 1) -> Engine:
        load, sizes = loaded.pixels.__getitem__, loaded.sizes
        return Engine(self.model, load, self.prompts.ends, sampling, rows=rows, sizes=sizes, images=self._features)

    def _prepare(self, name: str, prompt: str, image: Images, history: History, loaded: _Loaded) -> Prompt:
        """Make a prompt, and put its images into `loaded`."""
        system, past = conversation(history)
        asked = [Exchange(prompt, "", tuple(as_list(image)))]
        turns = [(e.question, [self._load(item, loaded) for item in as_list(e.images)]) for e in [*past, *asked]]
        return self.prompt(name, turns, [e.answer for e in past], system, loaded.sizes)

    def prompt(
        self,
        name: str,
        questions: Sequence[tuple[str, Sequence[str]]],
        answers: Sequence[str],
        system: str | None,
        sizes: Mapping[str, Extent],
    ) -> Prompt:
        """Make a prompt of a conversation, and see that it leaves room for an answer.

        Args:
            questions: each with the keys of its images; the last one is to be answered.
            answers: to all questions but the last.
            system: the conversation's own system message; None takes the template's.
            sizes: width and height of each image, by key; of a video how many frames it has too.

        Raises:
            UserError: images and `<image>` slots differ in number, or the prompt does not fit the model's context.
        """
        turns: list[Turn] = []
        keys: list[str] = []
        for (asked, images), answer in zip(questions, [*answers, None], strict=True):
            _check_slots(asked, len(images))
            turns.append(question(asked, len(images), answer))
            keys += images
        counts = [self.model.tokens_of(*sizes[key]) for key in keys]
        made = self.prompts.prompt(name, turns, keys, counts, system)
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None:
            return made
        if len(made.ids) >= limit:
            raise TooLongError(
                f"the prompt is {len(made.ids)} tokens long with its images, and the model reads {limit} at most. "
                "Shorten it, or start a new conversation."
            )
        return replace(made, limit=limit - len(made.ids))

    def _load(self, image: ImageInput, loaded: _Loaded) -> str:
        """Open an image, and return its key: of its size and pixels, so that the same image is encoded once."""
        opened = decode(image, self.loaded.description.sampling)
        extent: Extent
        if isinstance(opened, Clip):
            pixels = torch.stack([self.transform.one_view(frame) for frame in opened.frames])
            extent = (0, 0, len(opened.frames))
        else:
            pixels, extent = self.transform(opened), opened.size
        key = hashlib.sha256(repr(extent).encode() + pixels.numpy().tobytes()).hexdigest()
        loaded.pixels[key], loaded.sizes[key] = pixels, extent
        return key


class Conversation:
    """Questions and answers with one model; each question sees all that came before.

    Attributes:
        history: what was said, oldest first.

    Raises:
        UserError, DataError: an image cannot be read; at once, not at the first question.
    """

    def __init__(self, model: ChatModel, image: Images = None) -> None:
        self.model = model
        self.history: list[Exchange] = []
        self._images: tuple[ImageInput, ...] = ()
        self.show(image)

    def show(self, image: Images) -> None:
        """Put an image or a `Video`, or several, in front of the next question, in place of those that wait for it.

        Raises:
            UserError, DataError: an image cannot be read; those that wait are kept.
        """
        trained = self.model.loaded.description.sampling
        self._images = tuple(decode(item, trained) for item in as_list(image))

    def ask(self, question: str, **options: Any) -> str:
        """Return the answer and remember it."""
        return "".join(self.stream(question, **options))

    def stream(self, question: str, **options: Any) -> Iterator[str]:
        """Yield the answer in pieces; it is remembered when it is complete, not if the stream is left before."""
        images = self._images
        pieces = []
        for piece in self.model.stream(question, images, self.history, **options):
            pieces.append(piece)
            yield piece
        self.history.append(Exchange(question, "".join(pieces), images))
        self._images = ()


def _check_slots(prompt: str, images: int) -> None:
    slots = prompt.count(IMAGE_SLOT)
    if slots not in (0, images):
        raise UserError(
            f"the prompt has {slots} `{IMAGE_SLOT}` slots, but {images} images came with it. Give one for each slot."
        )
