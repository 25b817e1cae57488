"""A thin transformers.Trainer: our batches, our loss normalisation, our crash-safe checkpoints, and nothing else.

Everything that touches Trainer's private methods is in this file; an upgrade of transformers is checked here.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from tinylmm.errors import NonFiniteError
from tinylmm.models.lmm import LMM
from tinylmm.models.loss import num_chunks
from tinylmm.stop import stop_requested
from tinylmm.training.ahead import StepReader
from tinylmm.training.arguments import Arguments
from tinylmm.training.checkpoints import CheckpointFolder
from tinylmm.training.dataset import start_reader
from tinylmm.training.optimizer import make_optimizer
from tinylmm.training.pipes import Packed, needs_pipes, readahead
from tinylmm.training.ranks import any_rank, barrier, gather, rank, set_timeout, waiting, world_size
from tinylmm.training.sampler import StepSampler
from tinylmm.training.sharding import exact_shares
from tinylmm.training.state import Partitioned, Replicated, Source, load_state, load_weights, save_state, trained

log = logging.getLogger(__name__)

STATE_FILE, SCHEDULER_FILE, SCALE_FILE = "trainer_state.json", "scheduler.pt", "scale.json"
"""Beside the files of `training/state.py` and the random states; the first is where transformers looks for it."""
SCALE_FLOOR = 1.0
"""Loss scale below which a gradient that is not finite is no overflow of scaling."""


@dataclass(frozen=True)
class SaveSchedule:
    """When a checkpoint is due: every so many steps, or after so much time, whichever comes first."""

    steps: int
    seconds: float


def all_finite(numbers: list[Tensor]) -> bool:
    """Whether none of some scalars is infinite or no number; asks the device once."""
    return not numbers or bool(torch.isfinite(torch.stack([number.float() for number in numbers])).all())


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
        step_timeout_s: how long ranks wait for each other once the first step is done,
        save_timeout_s: and while something is written.
        spreads: whether the model's weights wait to be spread over the ranks (`training/sharding.py`).
        same_modules: whether every rank must run every module equally often (ZeRO-3, which gathers weights in each).
    """

    def __init__(
        self,
        model: LMM,
        args: Arguments,
        dataset: Dataset[Any],
        sampler: StepSampler,
        collate: Any,
        checkpoints: CheckpointFolder,
        learning_rates: dict[str, float],
        schedule: SaveSchedule,
        step_timeout_s: float,
        save_timeout_s: float,
        same_modules: bool,
        spreads: bool,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.step_timeout_s = step_timeout_s
        self.save_timeout_s = save_timeout_s
        self._same_modules = same_modules
        self._spreads = spreads
        self.optimizer: torch.optim.Optimizer | None
        self._sampler = sampler
        self._checkpoints = checkpoints
        self._learning_rates = learning_rates
        self._step_sample_ids: list[list[str]] = []
        self._losses: list[Tensor] = []
        self._largest: list[Tensor] = []
        self.reader = StepReader(args.device, args.gradient_accumulation_steps)
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
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=self._sampler,
            collate_fn=Packed(self.data_collator) if needs_pipes(workers) else self.data_collator,
            num_workers=workers,
            timeout=self.step_timeout_s if workers else 0,
            prefetch_factor=readahead(workers, self.args.gradient_accumulation_steps),
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=False,
            worker_init_fn=start_reader,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """Fetch one step's micro-batches and count its supervised tokens over all ranks."""
        ahead = self.watched(self.reader.read(epoch_iterator))
        batches = [batch for _, batch in zip(range(num_batches), ahead, strict=False)]
        self._step_sample_ids = [batch.pop("sample_ids") for batch in batches]
        self._losses, self._largest = [], []
        each = torch.tensor([len(batch["layout"]["supervised"]) for batch in batches], device=device)
        tokens = each.sum()
        if world_size() > 1:
            torch.distributed.all_reduce(tokens)
        if self._same_modules:  # the output head runs once a chunk: on every rank as often as on the one with most
            torch.distributed.all_reduce(each, op=torch.distributed.ReduceOp.MAX)
            for batch, most in zip(batches, each.tolist(), strict=True):
                batch["loss_chunks"] = num_chunks(most)
        return batches, tokens

    def watched(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Pass a step's batches on; whoever keeps count of them looks here."""
        return batches

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
        return (loss, output) if return_outputs else loss

    # ------------------------------------------------------------------------------ agreement before the optimiser step

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check loss and gradient norm on every rank before the optimiser step that follows this call."""
        norm = super()._get_grad_norm(model, grad_norm)
        if not self.is_deepspeed_enabled:
            norm_finite = bool(torch.isfinite(torch.as_tensor(norm)))
            self._agree(all_finite(self._losses) and (norm_finite or self._scaler_skips()))
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
        """One kernel and one number, which nobody waits for before the step: a GPU that was asked at once would run dry."""
        self._largest.append(torch.linalg.vector_norm(gradient.detach(), ord=math.inf))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled:  # else Trainer has called it already
            self._load_from_checkpoint(resume_from_checkpoint)
        rounds = self.is_deepspeed_enabled and (self.args.bf16 or self.args.fp16)
        shares = exact_shares(self.model, self.args, self._spreads) if self.is_deepspeed_enabled else {}
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        if rounds:
            Partitioned(model).put_weights(trained(self.model), shares)
        if resume_from_checkpoint is not None:
            self._restore(Path(resume_from_checkpoint))
        if self.is_deepspeed_enabled:
            step = model.step

            def checked_step(*args: Any, **kwargs: Any) -> Any:
                # In fp16 DeepSpeed's own scaler skips a step whose gradients overflow, and halves its scale.
                self._agree(all_finite(self._losses) and (self.args.fp16 or all_finite(self._largest)))
                return step(*args, **kwargs)

            model.step = checked_step
        return model, loader

    # ------------------------------------------------------------------------------------------ optimiser

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See `make_optimizer`."""
        if self.optimizer is None:
            network = self.model if model is None else model
            self.optimizer = make_optimizer(network, self.args, self._learning_rates)
        return self.optimizer

    # ------------------------------------------------------------------------------------------ checkpoints

    def save_due(self) -> bool:
        """Whether a checkpoint is due after this step; decided by rank 0's clock, the same on every rank."""
        by_step = self.state.global_step % self._schedule.steps == 0
        late = time.monotonic() - self._last_save > self._schedule.seconds and rank() == 0
        return by_step or any_rank([late], self.args.device)[0]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the training's state into the staging folder, every rank its share, then publish it atomically."""
        set_timeout(self.save_timeout_s)
        if rank() == 0:
            self._checkpoints.clear_staging(self.state.global_step)
        barrier()
        folder = self._checkpoints.staged(self.state.global_step)
        form = save_state(folder, self.model, self._state_source())
        self._save_rng_state(str(folder))
        if rank() == 0:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
            (folder / SCALE_FILE).write_text(json.dumps(self._loss_scale()), encoding="utf-8")
            self.state.save_to_json(str(folder / STATE_FILE))
        with waiting(f"the checkpoint of step {self.state.global_step} to be written"):
            barrier()
            if rank() == 0:
                self._checkpoints.publish(self.state.global_step, form)
            barrier()
        set_timeout(self.step_timeout_s)
        self._last_save = time.monotonic()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(Path(resume_from_checkpoint), self.model)

    def _restore(self, folder: Path) -> None:
        """Put weights, optimiser, schedule and loss scale back as they were, whatever launch wrote them."""
        load_state(folder, self.model, self._state_source())
        self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_FILE, weights_only=True))
        for group, rate in zip(self.lr_scheduler.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        self._set_loss_scale(json.loads((folder / SCALE_FILE).read_text(encoding="utf-8")))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Each rank goes on with the random numbers it had; another number of ranks begins anew, each with its own."""
        files = list(Path(checkpoint).glob("rng_state*.pth")) if checkpoint else []
        if checkpoint and len(files) == world_size():
            super()._load_rng_state(checkpoint)
        elif checkpoint:
            log.info(
                "%d ranks go on where %d stopped: dropout draws other numbers than it would have",
                world_size(),
                len(files),
            )
            set_seed(self.args.seed + self.state.global_step * world_size() + rank())

    def _state_source(self) -> Source:
        if self.is_deepspeed_enabled:
            return Partitioned(self.model_wrapped)
        return Replicated(self.optimizer.optimizer)  # type: ignore[union-attr]

    def _loss_scale(self) -> dict[str, float] | None:
        """The scale of fp16's losses, and how many steps in a row it has served."""
        if self.is_deepspeed_enabled:
            if not self.args.fp16:
                return None
            scaler = self.model_wrapped.optimizer.loss_scaler
            return {"scale": scaler.cur_scale, "good_steps": scaler.cur_iter - scaler.last_overflow_iter - 1}
        scaler = self.accelerator.scaler
        return None if scaler is None else {"scale": scaler.get_scale(), "good_steps": scaler._get_growth_tracker()}

    def _set_loss_scale(self, saved: dict[str, float] | None) -> None:
        if saved is None:
            return
        if self.is_deepspeed_enabled:
            scaler = self.model_wrapped.optimizer.loss_scaler
            scaler.cur_scale, scaler.cur_iter = saved["scale"], int(saved["good_steps"])
            scaler.last_overflow_iter = -1
        else:
            scaler = self.accelerator.scaler
            scaler.scale(torch.ones((), device=self.args.device))  # it makes its tensors at first use
            state = scaler.state_dict() | {"scale": saved["scale"], "_growth_tracker": int(saved["good_steps"])}
            scaler.load_state_dict(state)

    def full_state(self, frozen: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Gather the whole trained state on rank 0 under ZeRO, in fp32; None elsewhere, where the model itself has it.

        Under ZeRO the model holds a rounded copy, or a share of it. Every rank must call it.

        Args:
            frozen: parameters that are not trained, as they were before DeepSpeed rounded them.
        """
        if not self.is_deepspeed_enabled:
            return None
        source = Partitioned(self.model_wrapped)
        state = dict(frozen)
        for name, parameter in trained(self.model).items():
            whole = source.weight(parameter)
            if rank() == 0:
                state[name] = whole.cpu()
        parameters = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        return state | {name: buffer for name, buffer in self.model.state_dict().items() if name not in parameters}


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
