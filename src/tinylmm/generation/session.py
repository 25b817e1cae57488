"""Talk to a trained model from Python: one question, a conversation, a stream, a batch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tinylmm.data.chat import IMAGE_SLOT, Turn, get_template
from tinylmm.data.images import MAX_PIXELS, ImageTransform, open_image
from tinylmm.errors import DataError, UserError
from tinylmm.generation.sampling import Sampling, generate_tokens
from tinylmm.models.checkpoint import LoadedModel, load_model
from tinylmm.models.lmm import IMAGE_TOKEN_ID
from tinylmm.models.vision import encode_images
from tinylmm.store.find_model import find_model

ImageInput = str | Path | Image.Image
Images = ImageInput | Sequence[ImageInput] | None
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KEPT_FEATURES = 32
"""Images whose tower features are kept, so that a conversation encodes its image once."""


@dataclass(frozen=True)
class Exchange:
    """A question that was answered, with the images it came with."""

    question: str
    answer: str
    images: tuple[ImageInput, ...] = ()


History = Sequence[Exchange | tuple[str, str]]


def load(
    where: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    trust: Sequence[str] = (),
    store: Path | None = None,
) -> ChatModel:
    """Load a model to talk to.

    Args:
        where: a model folder, a stage or run folder of the store, or the name of a run.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:1".
        dtype: "auto" (bf16 on a GPU, fp32 on the CPU), "fp32", "bf16" or "fp16".
        trust: packages besides tinylmm and transformers whose classes the model may be made of.
        store: where runs are looked for by name.

    Raises:
        UserError: there is no such model, device or dtype.
        IntegrityError: files of the model are missing or damaged.
    """
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"dtype is '{dtype}'; allowed: auto, {', '.join(DTYPES)}.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device is '{device}', but no CUDA GPU was found (torch {torch.__version__}). Use device=cpu.")
    folder = find_model(where, store)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    kind = DTYPES.get(dtype, torch.bfloat16 if target.type == "cuda" else torch.float32)
    loaded = load_model(folder, list(trust))
    loaded.model.to(device=target, dtype=kind)
    return ChatModel(loaded)


@dataclass(frozen=True)
class Prepared:
    """A prompt's token ids with placeholders, and for each image its pixels, and its width and height."""

    ids: list[int]
    pixels: list[Tensor]
    sizes: list[tuple[int, int]]


class ChatModel:
    """A loaded model that answers; greedy unless sampling options say otherwise.

    Options of `chat`, `stream` and `chat_batch`: the fields of `Sampling` (max_new_tokens, temperature, top_p, top_k,
    repetition_penalty, seed).
    """

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self.model = loaded.model.eval()
        self.tokenizer = loaded.tokenizer
        self.template = get_template(self.model.template)
        self.transform = ImageTransform(**loaded.description["image"])
        self._ends = set(self.template.stop_ids(self.tokenizer))
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def chat(self, prompt: str | Sequence[str], image: Any = None, history: Any = (), **options: Any) -> Any:
        """Answer one prompt, or a list of prompts (then see `chat_batch`, whose lists `image` and `history` are).

        Args:
            prompt: the question. Images come in front of it, or where it says `<image>`, once for each.
            image: None, a file, a PIL image, or a list of these.
            history: what was said before, oldest first: `Exchange`s, or (question, answer) pairs.
            options: see the class.

        Returns:
            The answer, without surrounding white space.

        Raises:
            UserError: images and `<image>` slots differ in number, or the prompt does not fit the model's context.
            DataError: an image cannot be read.
        """
        if not isinstance(prompt, str):
            return self.chat_batch(prompt, image, history or None, **options)
        return self.chat_batch([prompt], [image], [history], **options)[0]

    def chat_batch(
        self,
        prompts: Sequence[str],
        images: Sequence[Images] | None = None,
        histories: Sequence[History] | None = None,
        batch_size: int = 8,
        **options: Any,
    ) -> list[str]:
        """Answer many prompts, `batch_size` at once; the answers are those of single calls.

        Args:
            prompts: questions.
            images: for each prompt what `chat` takes; None for no images at all.
            histories: for each prompt what `chat` takes; None for none.
            batch_size: prompts that are generated together.
            options: see the class.

        Raises:
            UserError, DataError: as `chat`; or the lists differ in length.
        """
        images = [None] * len(prompts) if images is None else images
        histories = [()] * len(prompts) if histories is None else histories
        if isinstance(images, str | Path | Image.Image) or not len(prompts) == len(images) == len(histories):
            raise UserError(
                f"{len(prompts)} prompts need as many entries in images and in histories (one list each; None for no image)."
            )
        sampling = Sampling(**options)
        texts: list[str] = []
        for first in range(0, len(prompts), batch_size):
            rows = range(first, min(first + batch_size, len(prompts)))
            prepared = [self._prepare(prompts[i], images[i], histories[i]) for i in rows]
            answers: list[list[int]] = [[] for _ in rows]
            for step in self._steps(prepared, sampling):
                for answer, token in zip(answers, step, strict=True):
                    answer += [] if token is None else [token]
            texts += [self._text(answer).strip() for answer in answers]
        return texts

    def stream(self, prompt: str, image: Images = None, history: History = (), **options: Any) -> Iterator[str]:
        """Yield the answer of `chat` in pieces as it is written; joined, they are that answer.

        Args, Raises: as `chat`, and errors come before the first piece.
        """
        prepared, sampling = self._prepare(prompt, image, history), Sampling(**options)
        return self._pieces(self._steps([prepared], sampling))

    def conversation(self, image: Images = None) -> Conversation:
        """Begin a conversation; its first question comes with the image."""
        return Conversation(self, image)

    def _pieces(self, steps: Iterator[list[int | None]]) -> Iterator[str]:
        ids: list[int] = []
        sent = ""
        for (token,) in steps:
            ids += [] if token is None else [token]
            # Behind a half-written character and trailing white space more may come that changes them: hold them back.
            text = self._text(ids).lstrip()
            ready = text.rstrip("\ufffd").rstrip()
            if ready.startswith(sent) and len(ready) > len(sent):
                yield ready[len(sent) :]
                sent = ready
        final = self._text(ids).strip()
        if len(final) > len(sent):
            yield final[len(sent) :]

    def _steps(self, prepared: list[Prepared], sampling: Sampling) -> Iterator[list[int | None]]:
        """Check lengths, encode images, and hand on to the decoding loop."""
        prompts = [one.ids for one in prepared]
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(map(len, prompts))
        if limit is not None and longest >= limit:
            raise UserError(
                f"the prompt is {longest} tokens long with its images, and the model reads {limit} at most. "
                "Shorten it, or start a new conversation."
            )
        room = sampling.max_new_tokens if limit is None else min(sampling.max_new_tokens, limit - longest)
        fitted = Sampling(**{**sampling.__dict__, "max_new_tokens": room})
        pixels = [tensor for one in prepared for tensor in one.pixels]
        features = torch.cat([self._encode(tensor) for tensor in pixels]) if pixels else None
        sizes = torch.tensor([size for one in prepared for size in one.sizes]) if pixels and self.model.tiled else None
        pad_id = int(self.tokenizer.pad_token_id)
        return generate_tokens(self.model, prompts, features, fitted, self._ends, pad_id, sizes)

    def _prepare(self, prompt: str, image: Images, history: History) -> Prepared:
        """Return the prompt's ids with placeholders, and its images in their order."""
        turns, pixels, sizes = [], [], []
        past = [item if isinstance(item, Exchange) else Exchange(*item) for item in history]
        for question, answer, images in [(e.question, e.answer, e.images) for e in past] + [(prompt, None, image)]:
            found = _as_list(images)
            turns.append(Turn(_with_slots(question, len(found)), answer))
            opened = [_open(item) for item in found]
            pixels += [self.transform(item) for item in opened]
            sizes += [item.size for item in opened]
        ids = self.template.render_prompt(turns, self.tokenizer)
        counts = iter(self.model.tokens_of(*size) for size in sizes)
        return Prepared([t for i in ids for t in ([i] * next(counts) if i == IMAGE_TOKEN_ID else [i])], pixels, sizes)

    def _encode(self, pixels: Tensor) -> Tensor:
        """(3, H, W) or (T, 3, H, W) of tiles to (1 or T, P, Dv), from memory if the same pixels came before."""
        key = hashlib.sha256(pixels.numpy().tobytes()).digest()
        if key not in self._features:
            self._features[key] = encode_images(self.model.vision_tower, pixels.view(-1, *pixels.shape[-3:]))
            if len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Conversation:
    """Questions and answers with one model; each question sees all that came before.

    Attributes:
        history: what was said, oldest first.
    """

    def __init__(self, model: ChatModel, image: Images = None) -> None:
        self.model = model
        self.history: list[Exchange] = []
        self._images = tuple(_as_list(image))

    def show(self, image: Images) -> None:
        """Put images in front of the next question."""
        self._images += tuple(_open(item) for item in _as_list(image))

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


def _as_list(image: Images) -> list[ImageInput]:
    if image is None:
        return []
    return [image] if isinstance(image, str | Path | Image.Image) else list(image)


def _with_slots(question: str, count: int) -> str:
    """Give a question a slot for each image: those it has itself, or all in front."""
    slots = question.count(IMAGE_SLOT)
    if slots == 0:
        return f"{IMAGE_SLOT}\n" * count + question
    if slots != count:
        raise UserError(
            f"the prompt has {slots} `{IMAGE_SLOT}` slots, but {count} images came with it. Give one for each slot."
        )
    return question


def _open(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        if image.width * image.height > MAX_PIXELS:
            raise DataError(
                f"the image has {image.width * image.height:,} pixels; at most {MAX_PIXELS:,}. Scale it down."
            )
        return image.convert("RGB")
    if not Path(image).is_file():
        raise DataError(f"{image}: no such image file. Give the path of a local file; nothing is downloaded.")
    return open_image(Path(image))
