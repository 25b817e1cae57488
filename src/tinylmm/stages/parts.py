"""The `parts` stage: train a tokenizer, a small LLM or a small vision tower from nothing, on a data source.

The two trained parts never meet here: the LLM sees text alone, the tower images and their captions under a text encoder
of its own. Output is a Hugging Face folder with `part.json`, the part's identity, beside the weights.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from tinylmm.config.identities import PART_FILE
from tinylmm.config.targets import resolve_target
from tinylmm.constants import IGNORE_INDEX
from tinylmm.data.chat import get_template
from tinylmm.data.images import open_image, safe_path
from tinylmm.data.records import Place
from tinylmm.data.sample import BadRecord, Sample, parse_record
from tinylmm.data.transform import ImageTransform
from tinylmm.errors import ConfigError, DataError, Fault
from tinylmm.models.pretraining import ContrastivePair, Vocabulary
from tinylmm.models.tokenizer import train_tokenizer
from tinylmm.planning.specs import PartsStage
from tinylmm.stages.images import names_of
from tinylmm.stages.job import StageJob
from tinylmm.stages.sources import Source
from tinylmm.training.part_loop import LoopSettings, train_loop

log = logging.getLogger(__name__)

Value = TypeVar("Value")

TEXT_TEMPLATE = "llama"
"""Chat template in which the LLM and the tokenizer meet conversations."""
TOKENIZER_MAX_LENGTH = 1024
MAX_SHIFT = 1
"""Pixels by which a tower's whole batch is moved at random: few scans are thousands of scenes, and this makes more of them."""


def run(job: StageJob[PartsStage]) -> dict[str, Any]:
    """Build the part that `job.spec.role` names into `job.output`; return the summary for the manifest.

    Raises:
        ConfigError: architecture and tokenizer do not fit each other, or a class is not what it should be.
        DataError: the source has broken records, or nothing to train on.
        NonFiniteError, StoppedError: see `part_loop.train_loop`.
    """
    builders = {"tokenizer": _build_tokenizer, "llm": _build_llm, "vision_tower": _build_tower}
    summary = builders[job.spec.role](job)
    identity = job.spec.model_dump(mode="json", exclude_unset=True, exclude={"build", "source"})
    (job.output / PART_FILE).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    return summary


# ---------------------------------------------------------------------------------------------------- tokenizer


def _build_tokenizer(job: StageJob[PartsStage]) -> dict[str, Any]:
    template = get_template(TEXT_TEMPLATE)
    # The end of an answer is a special token wherever it stands, so its text is nothing to learn merges from.
    texts = [template.text(sample.turns).replace(template.eos or "", "\n") for sample in _read_source(job)]
    tokenizer = train_tokenizer(texts, _given(job.spec.vocab_size), TOKENIZER_MAX_LENGTH)
    tokenizer.save_pretrained(job.output)
    return {"entries": len(tokenizer), "conversations": len(texts)}


# ---------------------------------------------------------------------------------------------------- LLM


def _build_llm(job: StageJob[PartsStage]) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(job.parents["tokenizer"], local_files_only=True)
    rows = _text_rows(job, tokenizer)
    model = _new_model(job, _given(job.spec.target), "llm")
    _check_vocabulary(model, tokenizer)
    model.config.bos_token_id, model.config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    model.config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    build = _given(job.spec.build)
    batches = _LengthBatches(rows, build.batch, build.seed, int(tokenizer.pad_token_id))

    def loss_of_step(step: int) -> Tensor:
        input_ids, labels = batches(step)
        # Padding is on the right, where a causal model never looks: no mask is needed, and SDPA is faster without.
        loss: Tensor = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        return loss

    loss = train_loop(model, loss_of_step, _settings(job), job.folder, job.metrics)
    model.save_pretrained(job.output)
    return {"steps": build.steps, "loss": loss, "parameters": _count(model), "conversations": len(rows)}


def _text_rows(job: StageJob[PartsStage], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
    """Render every conversation; ids and labels, only answers supervised. Too long ones are an error, never cut."""
    template = get_template(TEXT_TEMPLATE)
    longest = _given(job.spec.build).max_length
    rows = []
    for sample in _read_source(job):
        if sample.images:
            raise DataError(f"record {sample.sample_id} has an image, but an LLM is pretrained on text alone")
        rendered = template.render(sample.turns, tokenizer)
        if len(rendered.input_ids) > longest:
            raise DataError(
                f"record {sample.sample_id} has {len(rendered.input_ids)} tokens, more than "
                f"llm.build.max_length={longest}. Raise it, or shorten the record."
            )
        rows.append((rendered.input_ids, rendered.labels))
    return rows


class _LengthBatches:
    """Batches of conversations of like length, which need little padding; the order depends on (seed, step) alone."""

    def __init__(self, rows: Sequence[tuple[list[int], list[int]]], batch: int, seed: int, pad_id: int) -> None:
        self._rows = sorted(rows, key=lambda row: len(row[0]))
        self._batch = min(batch, len(rows))
        self._seed = seed
        self._pad_id = pad_id
        self._shuffled: tuple[int, list[list[int]]] = (-1, [])

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return ids and labels (B, S) of a step; every conversation comes once in an epoch."""
        whole = max(1, len(self._rows) // self._batch)
        epoch, position = divmod(step, whole)
        if self._shuffled[0] != epoch:
            self._shuffled = (epoch, self._windows(epoch))
        rows = [self._rows[index] for index in self._shuffled[1][position]]
        width = max(len(ids) for ids, _ in rows)
        input_ids = torch.full((len(rows), width), self._pad_id)
        labels = torch.full((len(rows), width), IGNORE_INDEX)
        for number, (ids, row_labels) in enumerate(rows):
            input_ids[number, : len(ids)] = torch.tensor(ids)
            labels[number, : len(ids)] = torch.tensor(row_labels)
        return input_ids, labels

    def _windows(self, epoch: int) -> list[list[int]]:
        """Cut the sorted list into batches at another offset each epoch, in random order."""
        generator = _generator(self._seed, epoch)
        count = len(self._rows)
        offset = int(torch.randint(count % self._batch + 1, (1,), generator=generator))
        starts = range(offset, count - self._batch + 1, self._batch)
        windows = [list(range(start, start + self._batch)) for start in starts]
        return [windows[int(index)] for index in torch.randperm(len(windows), generator=generator)]


def _check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if len(tokenizer) > model.config.vocab_size:
        what = f"is {model.config.vocab_size}, but the tokenizer has {len(tokenizer)} entries."
        raise ConfigError([Fault("llm.architecture.vocab_size", what, "Make it at least llm.tokenizer.vocab_size.")])


# ---------------------------------------------------------------------------------------------------- vision tower


def _build_tower(job: StageJob[PartsStage]) -> dict[str, Any]:
    samples = _read_source(job)
    captions = [sample.turns[0].assistant or "" for sample in samples]
    build = _given(job.spec.build)
    pixels = _load_images(job, samples)
    vocabulary = Vocabulary(captions)
    words = vocabulary.encode(captions, build.max_length)
    encoder = _new_model(job, _given(job.spec.encoder), "encoder")
    pair = ContrastivePair(encoder, encoder.config.hidden_size, len(vocabulary), build.max_length, build.text_tower)

    def loss_of_step(step: int) -> Tensor:
        generator = _generator(build.seed, step)
        chosen = torch.randperm(len(captions), generator=generator)[: build.batch]
        down, right = torch.randint(-MAX_SHIFT, MAX_SHIFT + 1, (2,), generator=generator).tolist()
        loss: Tensor = pair(pixels[chosen].roll((down, right), dims=(2, 3)), words[chosen])
        return loss

    loss = train_loop(pair, loss_of_step, _settings(job), job.folder, job.metrics)
    encoder.save_pretrained(job.output)
    return {
        "steps": build.steps,
        "loss": loss,
        "parameters": _count(encoder),
        "images": len(captions),
        "caption_words": len(vocabulary),
    }


def _load_images(job: StageJob[PartsStage], samples: Sequence[Sample]) -> Tensor:
    """Return all images as the tower sees them, (N, 3, H, W) float32: embedded data sets are small enough."""
    transform, source = ImageTransform.of(_given(job.spec.image)), Source.of(job)
    upright = job.spec.source.orientation == "apply"
    return torch.stack([transform.one_view(_open(sample, source, upright)) for sample in samples])


def _open(sample: Sample, source: Source, upright: bool) -> Image.Image:
    """The one image of a record, from the source's folder or from the record itself."""
    if len(sample.images) != 1:
        raise DataError(
            f"{source.annotations}: record {sample.sample_id} has {len(sample.images)} images, but a tower is pretrained on "
            "records with one image and its caption. Correct or remove it."
        )
    (name,) = names_of(sample, source.images)
    if (data := sample.embedded.get(name)) is not None:
        return open_image(source.images / name, data, upright=upright)
    return open_image(safe_path(source.images, name, source.follow_links), upright=upright)


# ---------------------------------------------------------------------------------------------------- shared


def _read_source(job: StageJob[PartsStage]) -> list[Sample]:
    """Read the part's source whole; a broken record is an error."""
    source = Source.of(job)
    samples: list[Sample] = []
    for index, record in enumerate(source.records(Place())):
        sample = parse_record(index, record, source.format)
        if isinstance(sample, BadRecord):
            raise DataError(
                f"{source.annotations}: record {sample.index} ({sample.sample_id}): {sample.reason}. Correct or remove it."
            )
        samples.append(sample)
    if not samples:
        raise DataError(f"{source.annotations}: no records to train on")
    return samples


def _new_model(job: StageJob[PartsStage], dotted: str, role: Literal["llm", "encoder"]) -> PreTrainedModel:
    """Build a class of transformers from the spec's architecture with weights drawn from the build's seed."""
    model_class = resolve_target(dotted, job.settings.trust, PreTrainedModel, role)
    torch.manual_seed(_given(job.spec.build).seed)
    model: PreTrainedModel = model_class(model_class.config_class(**_given(job.spec.architecture)))
    return model


def _settings(job: StageJob[PartsStage]) -> LoopSettings:
    build = _given(job.spec.build)
    return LoopSettings(
        build.steps,
        build.batch,
        build.lr,
        build.warmup_ratio,
        build.weight_decay,
        log_steps=job.settings.tracking.log_steps,
    )


def _given(value: Value | None) -> Value:
    """A field that the role at hand has: the graph fills it."""
    assert value is not None, "the stage's spec lacks a field of its role"
    return value


def _generator(seed: int, number: int) -> torch.Generator:
    """Return a generator that depends on (seed, number) alone."""
    return torch.Generator().manual_seed(seed * 1_000_003 + number)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
