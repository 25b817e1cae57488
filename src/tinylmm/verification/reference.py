"""Training steps written a second time, as plainly as they can be: what every fast path is held against.

One sample at a time, unpacked, without padding; eager attention; the tower run on every image again; logits at every position,
by the model class's own forward pass; fp32; no cache, no accumulation of micro-batches, no Trainer. Sums are written out. It
shares with a training what defines it (the model's parts, the prepared samples and their order, how an image is decoded) and
nothing of how it is made fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from tinylmm.config.trainer import ADAMW
from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from tinylmm.models.anyres import TiledConnector
from tinylmm.models.lmm import LMM
from tinylmm.planning.specs import TrainStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.train import begin_plainly
from tinylmm.training.arguments import peak_learning_rates, training_arguments
from tinylmm.training.observe import without_dropout
from tinylmm.training.optimizer import make_optimizer
from tinylmm.training.sampler import Mixture, StepSampler, num_steps

CLIP_EPSILON = 1e-6
"""torch adds it to a gradient's norm before it divides by that."""


@dataclass
class Steps:
    """What some training steps were.

    Attributes:
        losses: of each step, mean over its supervised tokens (nats).
        gradients: of the first step, parameter -> gradient as the optimiser was given it; empty where nobody has them.
        weights: parameter -> its value after the last step.
        moved_by: of the reference, parameter -> of each step the rate, and one over what AdamW divided its gradient by; None
            where the optimiser is another.
        samples_per_row: most that a step had on average.
    """

    losses: list[float] = field(default_factory=list)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    moved_by: dict[str, list[tuple[float, Tensor]]] | None = None
    samples_per_row: float = 1.0


class Reference:
    """The plain form of one training.

    Args:
        job: of the training; its launch names eager attention.
        device: where it computes.
        in_reverse: take each step's samples from the last to the first: the same sum, in another order, so that what differs
            is this reference's own rounding.
        autocast: type that matrix products are computed in; None for fp32 throughout.
    """

    def __init__(
        self,
        job: StageJob[TrainStage],
        device: torch.device,
        in_reverse: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.spec, self.device = job.spec, device
        self.in_reverse, self.autocast = in_reverse, autocast
        loaded, self.samples, self.images, _ = begin_plainly(job, device)
        self.model: LMM = loaded.model.train()
        without_dropout(self.model)
        self.trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        mixture = Mixture(self.samples.sizes, self.spec.mixture or [1.0] * len(self.samples.sizes))
        spec = self.spec
        self.steps = num_steps(len(mixture), spec.global_batch, spec.epochs, spec.max_steps)
        # one rank that takes one sample at a time: what is left of the sampler is the order of the samples
        self.order = StepSampler(
            len(mixture), self.steps, spec.global_batch, spec.epochs, spec.seed, 1, pool=mixture.epoch
        )
        self.optimizer = self._optimizer(job)

    def run(self) -> Steps:
        """Do all steps."""
        found = Steps()
        ones = iter(self.order)
        for step in range(self.steps):
            indices = [index for _ in range(self.order.accumulation) for index in next(ones)]
            found.losses.append(self._backward(indices[::-1] if self.in_reverse else indices))
            self._clip()
            if step == 0:
                given = {name: p.grad for name, p in self.trained.items() if p.grad is not None}
                found.gradients = {name: gradient.detach().cpu().clone() for name, gradient in given.items()}
            self.optimizer.step(self._rate(step))
            for parameter in self.trained.values():
                parameter.grad = None
        found.weights = {name: p.detach().to("cpu", torch.float32).clone() for name, p in self.trained.items()}
        found.moved_by = self.optimizer.moved
        return found

    # ------------------------------------------------------------------------------------------ loss

    def _backward(self, indices: Sequence[int]) -> float:
        """Add up the gradients of a step's samples; returns its loss."""
        rows = [_expanded(self.samples[i], self.model, self.images, self.spec.max_length) for i in indices]
        supervised = sum(label != IGNORE_INDEX for _, labels, _ in rows for label in labels[1:])
        total = 0.0
        for ids, labels, names in rows:
            computing = nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)
            with computing:
                loss = self._loss_sum(ids, labels, names) / max(supervised, 1)
            if loss.requires_grad:
                loss.backward()
            total += float(loss.detach())
        return total

    def _loss_sum(self, ids: Sequence[int], labels: Sequence[int], names: Sequence[str]) -> Tensor:
        """Minus the log-probabilities of one sample's supervised tokens, added up."""
        embed = self.model.llm.get_input_embeddings()  # type: ignore[operator]
        images = iter([self._image(name) for name in names])
        pieces: list[Tensor] = []
        position = 0
        while position < len(ids):
            if ids[position] == IMAGE_TOKEN_ID:
                pieces.append(next(images).to(embed.weight.dtype))
                position += len(pieces[-1])
            else:
                pieces.append(embed(torch.tensor([ids[position]], device=self.device)))
                position += 1
        row = torch.cat(pieces)[None]
        logits = self.model.llm(inputs_embeds=row, use_cache=False).logits[0].float()
        likely = torch.log_softmax(logits, dim=-1)
        wanted = [(place, token) for place, token in enumerate(labels[1:]) if token != IGNORE_INDEX]
        return -sum((likely[place, token] for place, token in wanted), start=likely.new_zeros(()))

    def _image(self, name: str) -> Tensor:
        """(Q, Dl): what one image becomes in the LLM's input."""
        tower, connector = self.model.vision_tower, self.model.connector
        pixels = self.images.pixels(name)
        views = (pixels if pixels.dim() == 4 else pixels[None]).to(self.device, next(tower.parameters()).dtype)
        features = torch.cat([tower(view[None]) for view in views])
        if isinstance(connector, TiledConnector):
            tokens = connector(features, torch.tensor([self.images.size(name)], device=self.device))
        else:
            tokens = connector(features)[0]
        return tokens * self.model.image_scale

    # ------------------------------------------------------------------------------------------ step

    def _clip(self) -> None:
        """Shorten the gradient to `max_grad_norm`."""
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        factor = self.spec.max_grad_norm / (norm + CLIP_EPSILON)
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)

    def _rate(self, step: int) -> float:
        """Share of the peak learning rate at a step, counted from 0."""
        warm = math.ceil(self.spec.warmup_ratio * self.steps)
        if step < warm:
            return step / warm
        done = (step - warm) / max(1, self.steps - warm)
        if self.spec.schedule == "linear":
            return 1 - done
        if self.spec.schedule == "cosine":
            given = self.spec.trainer.lr_scheduler_kwargs
            cycles = 0.5 if given is None else given.num_cycles
            return max(0.0, 0.5 * (1 + math.cos(2 * math.pi * cycles * done)))
        return 1.0

    def _optimizer(self, job: StageJob[TrainStage]) -> PlainAdamW | LibraryOptimizer:
        spec, rates = self.spec, peak_learning_rates(self.spec.lr)
        if spec.trainer.optim in ADAMW:
            decayed = set(Trainer.get_decay_parameter_names(None, self.model))
            return PlainAdamW(self.trained, rates, decayed, spec)
        launch, settings = job.settings.launch, job.settings
        arguments = training_arguments(
            spec, launch, settings.tracking, settings.trainer, job.folder, self.steps, 1, self.device.type == "cpu", 0
        )
        return LibraryOptimizer(make_optimizer(self.model, arguments, rates))


def _expanded(
    sample: Mapping[str, Any], model: LMM, images: Any, max_length: int
) -> tuple[list[int], list[int], list[str]]:
    """Ids and labels of a prepared sample with every position of its images, cut to `max_length`, and the images left in it."""
    ids: list[int] = []
    labels: list[int] = []
    names = iter(sample["images"])
    kept: list[str] = []
    for token, label in zip(sample["input_ids"], sample["labels"], strict=True):
        name = next(names) if token == IMAGE_TOKEN_ID else None
        width = 1 if name is None else model.tokens_of(*images.size(name)) if model.tiled else model.image_tokens
        if len(ids) + width > max_length:  # an image that the cut would halve goes whole
            break
        ids += [token] * width
        labels += [label] * width
        kept += [] if name is None else [name]
    return ids, labels, kept


class PlainAdamW:
    """AdamW as published (arXiv 1711.05101), parameter by parameter."""

    def __init__(
        self, trained: Mapping[str, nn.Parameter], rates: Mapping[str, float], decayed: set[str], spec: TrainStage
    ) -> None:
        self.trained, self.rates, self.decayed, self.spec = trained, rates, decayed, spec
        self.first = {name: torch.zeros_like(p) for name, p in trained.items()}
        self.second = {name: torch.zeros_like(p) for name, p in trained.items()}
        self.done = 0
        self.moved: dict[str, list[tuple[float, Tensor]]] = {name: [] for name in trained}

    @torch.no_grad()
    def step(self, share: float) -> None:
        """Move every parameter that has a gradient, at this share of its peak rate."""
        self.done += 1
        one, two = self.spec.adam_betas
        for name, parameter in self.trained.items():
            if parameter.grad is None:
                continue
            rate = share * self.rates[name.partition(".")[0]]
            if name in self.decayed:
                parameter.mul_(1 - rate * self.spec.weight_decay)
            first, second, gradient = self.first[name], self.second[name], parameter.grad
            first.mul_(one).add_(gradient, alpha=1 - one)
            second.mul_(two).addcmul_(gradient, gradient, value=1 - two)
            root = (second / (1 - two**self.done)).sqrt().add_(self.spec.adam_epsilon)
            parameter.sub_(rate * (first / (1 - one**self.done)) / root)
            self.moved[name].append((rate, (1 / root).to("cpu", torch.bfloat16)))


class LibraryOptimizer:
    """Another optimiser, as every training makes it: written a second time it would be a copy."""

    moved = None

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]

    def step(self, share: float) -> None:
        """Take a step at this share of the peak rates."""
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * share
        self.optimizer.step()
