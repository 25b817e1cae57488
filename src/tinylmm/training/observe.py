"""What a training leaves for whoever compares it with another way to the same weights (`tinylmm verify`).

An observed training drops nothing at random and writes what a finished one does not keep: the gradients of its first step, as
the optimiser is given them, and its weights in fp32. Nothing else of it is different.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinylmm.errors import StoppedError
from tinylmm.training.ranks import rank

OBSERVED = "observed"
"""Folder in the work folder."""
GRADIENTS_FILE = "gradients.safetensors"
WEIGHTS_FILE = "weights.safetensors"
DROPOUT_RATES = ("attention_dropout", "hidden_dropout", "resid_dropout", "activation_dropout", "dropout")
"""Attributes by which modules of transformers hold rates that they hand to functions."""


class GradientRecord(TrainerCallback):
    """Writes the gradients of the first step's trained parameters, where this rank has them; under ZeRO none has.

    Args:
        folder: the stage's work folder.
        cut: break the training off before the step behind this one, as a power cut would.
    """

    def __init__(self, folder: Path, cut: int | None) -> None:
        self.folder = folder / OBSERVED
        self.cut = cut

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Break off where that was asked for.

        Raises:
            StoppedError: nothing is saved here; the last checkpoint is what is left.
        """
        if self.cut is not None and state.global_step == self.cut:
            raise StoppedError(f"broken off behind step {self.cut}, as was asked for")

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Write them."""
        if state.global_step > 0:
            return
        assert model is not None, "Trainer gives its callbacks the model"
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
        if rank() == 0 and gradients:
            _save(gradients, self.folder / GRADIENTS_FILE)


def write_weights(folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    """Write the trained parameters, of `state` where ZeRO has gathered them there. Rank 0 only."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _save({name: p if state is None else state[name] for name, p in trained.items()}, folder / OBSERVED / WEIGHTS_FILE)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file in this folder, in fp32 on the CPU; none where it was not written."""
    return load_file(path) if path.exists() else {}


def without_dropout(model: nn.Module) -> None:
    """Set every rate of dropout in a model to 0."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name in DROPOUT_RATES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    plain = {
        name.removeprefix("module.").replace("_orig_mod.", ""): t.detach().to("cpu", torch.float32).clone()
        for name, t in tensors.items()
    }
    save_file(plain, path)
