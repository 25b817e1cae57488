"""A thin transformers.Trainer: our batches, our loss normalisation, our crash-safe checkpoints, and nothing else.

Everything that touches Trainer's private methods is in this file; an upgrade of transformers is checked here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tinylmm.constants import IGNORE_INDEX
from tinylmm.errors import IntegrityError, NonFiniteError
from tinylmm.models.lmm import LMM
from tinylmm.stop import belong_to, stop_requested
from tinylmm.training.checkpoints import PREFIX, CheckpointFolder
from tinylmm.training.ranks import any_rank, barrier, gather, rank, set_timeout, world_size
from tinylmm.training.sampler import StepSampler

log = logging.getLogger(__name__)

TRAINED_WEIGHTS = "trained.safetensors"
SCALE_FLOOR = 1.0
"""Loss scale below which a gradient that is not finite is no overflow of scaling."""


@dataclass(frozen=True)
class SaveSchedule:
    """When a checkpoint is due: every so many steps, or after so much time, whichever comes first."""

    steps: int
    seconds: float


class LMMTrainer(Trainer):
    """Trains one stage.

    Args:
        model: the LMM with `requires_grad` already set.
        args: built by `training/arguments.py`.
        dataset: prepared samples by index.
        sampler: this rank's micro-batches of indices.
        collate: list of samples -> batch (see `data/collate.py`).
        checkpoints: where crash-safe checkpoints live.
        learning_rates: part -> peak learning rate.
        schedule: when to save.
        step_timeout_s: how long ranks wait for each other once the first step is done.
    """

    def __init__(
        self,
        model: LMM,
        args: TrainingArguments,
        dataset: Dataset[Any],
        sampler: StepSampler,
        collate: Any,
        checkpoints: CheckpointFolder,
        learning_rates: dict[str, float],
        schedule: SaveSchedule,
        step_timeout_s: float,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.step_timeout_s = step_timeout_s
        self.optimizer: torch.optim.Optimizer | None
        self._sampler = sampler
        self._checkpoints = checkpoints
        self._learning_rates = learning_rates
        self._step_sample_ids: list[list[str]] = []
        self._losses: list[Tensor] = []
        self._gradients_finite = True
        self.stopped = False
        self.skipped_steps = 0
        self._schedule = schedule
        self._last_save = time.monotonic()
        super().__init__(model=model, args=args, train_dataset=dataset, data_collator=collate, callbacks=callbacks)
        self.remove_callback(PrinterCallback)  # curves go to metrics.jsonl and the trackers
        self.add_callback(_StepEnd(self))
        # Our loss is a sum divided by the step's global token count: Trainer must not divide by accumulation again.
        self.model_accepts_loss_kwargs = True

    # ------------------------------------------------------------------------------------------ batches and loss

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's loader over the whole stage: to Trainer one epoch, so that resuming skips by step alone."""
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=False,
            worker_init_fn=partial(_start_reader, os.getpid()) if self.args.dataloader_num_workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Fetch one step's micro-batches and count its supervised tokens over all ranks."""
        batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self._step_sample_ids = [batch.pop("sample_ids") for batch in batches]
        self._losses, self._gradients_finite = [], True
        for batch in batches:
            for extra in ("segment_ids", "num_samples", "image_paths"):
                batch.pop(extra, None)
        tokens = torch.stack([(batch["targets"] != IGNORE_INDEX).sum() for batch in batches]).sum().to(device)
        if world_size() > 1:
            torch.distributed.all_reduce(tokens)
        return batches, tokens

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Sum over this micro-batch's supervised tokens / their number in the whole step, over accumulation and ranks.

        Times world size, because DDP and ZeRO average gradients over ranks.
        """
        output = model(**inputs)
        if num_items_in_batch is None:
            num_items_in_batch = output.num_supervised
        loss = output.loss_sum * (world_size() / torch.as_tensor(num_items_in_batch).clamp(min=1))
        self._losses.append(loss.detach())
        if self.is_deepspeed_enabled:  # its engine steps inside backward: this is the last moment before it
            self._agree(bool(torch.isfinite(loss)))
        return (loss, output) if return_outputs else loss

    # ------------------------------------------------------------------------------ agreement before the optimiser step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check loss and gradient norm on every rank before the optimiser step that follows this call."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:
            losses_finite = bool(torch.isfinite(torch.stack(self._losses)).all())
            norm_finite = bool(torch.isfinite(torch.as_tensor(norm)))
            self._agree(losses_finite and (norm_finite or self._scaler_skips()))
        return norm

    def _scaler_skips(self) -> bool:
        """Whether a loss scaler (fp16) skips the step at hand, whose gradients are not finite, and goes on with less scale.

        That is what it is there for: it doubles its scale until gradients overflow. At its floor there is nothing to halve.
        """
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() <= SCALE_FLOOR:
            return False
        self.skipped_steps += 1
        step, scale = self.state.global_step + 1, scaler.get_scale()
        log.info("step %d is skipped: a gradient overflows fp16 at loss scale %g", step, scale)
        return True

    def _agree(self, finite: bool) -> None:
        """Let all ranks learn whether one of them saw a non-finite number or was asked to stop.

        Raises:
            NonFiniteError: on every rank, with the sample ids of the ranks concerned; no weight has been touched.
        """
        not_finite, stop = any_rank([not finite, stop_requested()], self.args.device)
        self.stopped = self.stopped or stop
        if not_finite:
            local = [bool(torch.isfinite(loss)) for loss in self._losses]
            suspects = [ids for ids, good in zip(self._step_sample_ids, local, strict=False) if not good]
            found = gather(sorted({i for ids in (suspects or ([] if finite else self._step_sample_ids)) for i in ids}))
            ids = "; ".join(f"rank {r}: {', '.join(names)}" for r, names in enumerate(found) if names)
            raise NonFiniteError(
                f"the loss or gradient of step {self.state.global_step + 1} is not finite; no weight was changed by this step. "
                f"Samples of the batch: {ids}. Look at them with the data, or lower the learning rate."
            )

    def create_accelerator_and_postprocess(self) -> None:
        """Keep NaN visible: Trainer's own filter would log it as the running mean."""
        super().create_accelerator_and_postprocess()
        self.args.logging_nan_inf_filter = False

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(self._note_gradient)
        return super()._wrap_model(model, training, dataloader)

    def _note_gradient(self, gradient: Tensor) -> None:
        self._gradients_finite = self._gradients_finite and bool(torch.isfinite(gradient).all())

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_deepspeed_enabled:
            step = model.step

            def checked_step(*args: Any, **kwargs: Any) -> Any:
                self._agree(self._gradients_finite or self.args.fp16)  # DeepSpeed's own scaler skips and halves
                return step(*args, **kwargs)

            model.step = checked_step
        return model, loader

    # ------------------------------------------------------------------------------------------ optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate a part; no weight decay on biases and norms, as Trainer does it."""
        if self.optimizer is None:
            network = self.model if model is None else model
            decayed = set(self.get_decay_parameter_names(network))
            groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
            for name, parameter in network.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((name.split(".", 1)[0], name in decayed), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, network)
            self.optimizer = optimizer_class(
                [
                    {
                        "params": parameters,
                        "lr": self._learning_rates[part],
                        "weight_decay": self.args.weight_decay if decay else 0.0,
                        "part": part,
                    }
                    for (part, decay), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_due(self) -> bool:
        """Whether a checkpoint is due after this step; decided by rank 0's clock, the same on every rank."""
        by_step = self.state.global_step % self._schedule.steps == 0
        late = time.monotonic() - self._last_save > self._schedule.seconds and rank() == 0
        return by_step or any_rank([late], self.args.device)[0]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._checkpoints.staging())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Let Trainer write into the staging folder, then publish it atomically."""
        if rank() == 0:
            self._checkpoints.clear_staging()
        barrier()
        super()._save_checkpoint(model, trial)
        barrier()
        if rank() == 0:
            self._checkpoints.publish(self.state.global_step)
        barrier()
        self._last_save = time.monotonic()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained parameters alone; frozen ones are the parents'. DeepSpeed writes its own shards instead."""
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.is_deepspeed_enabled:
                save_file(_trained_state(self.model), folder / TRAINED_WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / TRAINED_WEIGHTS
        weights = load_file(path)
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if set(weights) != set(trained):
            raise IntegrityError(
                f"{path} holds other tensors than this stage trains: {sorted(set(weights) ^ set(trained))[:5]}"
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(weights[name])

    def full_state(self) -> dict[str, Tensor] | None:
        """Gather the whole model's state on rank 0 under ZeRO-3; None where the model itself has it.

        Every rank must call it.
        """
        if self.is_deepspeed_enabled and self.model_wrapped.zero_optimization_stage() == 3:
            state = self.accelerator.get_state_dict(self.model_wrapped)
            return dict(state) if state is not None else {}
        return None


def _start_reader(parent: int, number: int) -> None:
    """In a worker of the loader: a signal to every process of the run must not end it in the middle of a save."""
    belong_to(parent)


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}


class _StepEnd(TrainerCallback):
    """After each step: save when it is due, stop when some rank was asked to."""

    def __init__(self, trainer: LMMTrainer) -> None:
        self.trainer = trainer
        self.started = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if not self.started:  # start-up may take minutes, a step may not: a hung rank shall not cost half an hour
            self.started = True
            set_timeout(self.trainer.step_timeout_s)
        finished = state.global_step >= state.max_steps
        if self.trainer.stopped and not finished:
            control.should_save = True
            control.should_training_stop = True
        elif not finished and self.trainer.save_due():
            control.should_save = True
        if finished:
            control.should_training_stop = True
        return control


__all__ = ["PREFIX", "LMMTrainer", "SaveSchedule"]
