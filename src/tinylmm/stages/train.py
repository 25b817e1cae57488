"""The `train` stage: one step of a recipe, from parts or from the model of an earlier stage."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.training_args import ParallelMode

from tinylmm.config.description import ModelDescription
from tinylmm.config.identities import PartIdentity, TowerIdentity
from tinylmm.config.launch import LaunchSpec
from tinylmm.config.recipe import TuneHow
from tinylmm.data.collate import Collator
from tinylmm.errors import DataError, StoppedError
from tinylmm.models.adapters import adaptable_linears
from tinylmm.models.attention import choose_training_attention
from tinylmm.models.build import build_lmm, load_tokenizer, part_source
from tinylmm.models.checkpoint import LoadedModel, load_model, save_model, set_image_mode
from tinylmm.models.compiled import compile_blocks, compiles, graphs_compiled
from tinylmm.models.devices import choose_device
from tinylmm.models.fp8 import hold_in_eight_bits
from tinylmm.models.speed import speed_up
from tinylmm.models.tuning import PartTuning, apply_tuning, enable_checkpointing
from tinylmm.models.vision import HFVisionTower
from tinylmm.planning.specs import TrainStage
from tinylmm.stages.job import StageJob
from tinylmm.stages.kept import features_summary, open_pixels, pixels_summary
from tinylmm.stages.seen import Features, SeenImages, WithFeatures, open_cache, outputs_of
from tinylmm.stop import uninterrupted
from tinylmm.store.layout import CHECKPOINT_FOLDER, MODEL_FOLDER, StoreLayout
from tinylmm.store.pixels import PixelShelf
from tinylmm.training.arguments import peak_learning_rates, training_arguments
from tinylmm.training.callbacks import MetricsRow
from tinylmm.training.checkpoints import CheckpointFolder, Ranks
from tinylmm.training.clip_features import MixedFeatures
from tinylmm.training.cost import Cost, Peak, parts_of
from tinylmm.training.dataset import PreparedSamples
from tinylmm.training.figures import Counted, Figures, MeasuredTrainer
from tinylmm.training.frozen import KEPT, cast_frozen, frozen_in_trained_parts, kept_parts, own_copy
from tinylmm.training.machine import prepare_machine
from tinylmm.training.observe import GradientRecord, without_dropout, write_weights
from tinylmm.training.pipes import num_readers
from tinylmm.training.ranks import barrier, from_rank_zero, in_turn, over_ranks, rank, set_timeout, waiting, world_size
from tinylmm.training.sampler import Mixture, StepSampler, num_steps
from tinylmm.training.trackers import configure_tensorboard, wandb_run
from tinylmm.training.trainer import SaveSchedule

log = logging.getLogger(__name__)

END_TO_END = 2**30
"""Positions of a row that all samples of a micro-batch share."""


def run(job: StageJob[TrainStage]) -> dict[str, Any]:
    """Train, write the model to output/model, and return the summary for the manifest. Runs on every rank."""
    spec, launch = job.spec, job.settings.launch
    device = choose_device(launch.device, spec.precision)
    attention = choose_training_attention(launch.attention, spec.precision, device)
    prepare_machine(device)
    compiled = graphs_compiled()
    configure_tensorboard(job.folder)
    start = _own_start(job)
    with in_turn(device.type != "cpu"):
        loaded = _start_model(job, start, llm_weights=not (_spreads_llm(job) and rank() > 0))
        kept, tuning, frozen = _to_device(job, loaded, device)
    barrier()
    model = loaded.model
    model.set_attention(attention)
    if not _spreads_llm(job):
        speed_up(model, device, spec.precision)
    if job.observed is not None:
        without_dropout(model)
    images = SeenImages.of(job, loaded)
    samples = PreparedSamples(outputs_of(job, "prepared"), images.tokens, spec.max_length, job.settings.max_dropped)
    cache, pixels = _caches(job, loaded, samples, images)
    trainer = build_trainer(job, loaded, samples, images, cache, pixels, device)
    if job.observed is not None:
        trainer.add_callback(GradientRecord(job.folder, job.observed.cut))
    checkpoint = from_rank_zero(trainer._checkpoints.newest_valid() if rank() == 0 else None)
    if rank() == 0:
        trainer._checkpoints.forget_after(checkpoint)
    if checkpoint:
        log.info("resuming from %s", checkpoint)
    with (
        uninterrupted(),
        _no_reader_left(),
        closing(trainer.reader),
        wandb_run(job.settings.tracking, StoreLayout(job.store).tracking, job.name),
    ):
        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped and trainer.state.global_step < trainer.args.max_steps:
        raise StoppedError(
            f"stopped after step {trainer.state.global_step} of {trainer.args.max_steps}; the same command continues from there"
        )
    set_timeout(launch.save_timeout_s)
    with uninterrupted(), waiting("the trained model to be written"):
        state = trainer.full_state(frozen)
        if rank() == 0 and job.observed is not None:
            write_weights(job.folder, model, state)
        if rank() == 0:
            adapters = {part: decision.adapter for part, decision in tuning.items() if decision.adapter is not None}
            save_model(loaded, job.output / MODEL_FOLDER, state, kept, adapters)
            shutil.rmtree(job.folder / KEPT, ignore_errors=True)
        barrier()
    return {
        "steps": trainer.state.global_step,
        "train_loss": result.training_loss,
        "tuning": {part: {"mode": d.mode, "trained": d.trained, "total": d.total} for part, d in tuning.items()},
        **({"skipped_steps": trainer.skipped_steps} if trainer.skipped_steps else {}),
        "launched": _launched(launch, device, graphs_compiled() - compiled),
        **_seen(samples, cache, spec.max_length, pixels, trainer.figures),
        **({"commits": commits} if (commits := _commits(loaded)) else {}),
    }


def _caches(
    job: StageJob[TrainStage], loaded: LoadedModel, samples: PreparedSamples, images: SeenImages
) -> tuple[Features | None, PixelShelf | None]:
    """Features of a frozen tower, or else the pixel cache, where the launch has either. Every rank must call it."""
    names = samples.images()
    cache = open_cache(job, loaded, names, images)
    return cache, open_pixels(job, images, names, _passes(job, samples)) if cache is None else None


def _launched(launch: LaunchSpec, device: torch.device, compiled: int) -> dict[str, Any]:
    """What a launch that leaves it open was run with (`planning/choose.py`), and how many graphs were compiled for it."""
    return {
        "row_tokens": launch.positions(device.type != "cpu"),
        "sharding": launch.sharding,
        "checkpointing": launch.checkpoints,
        **({"graphs_compiled": compiled} if compiled else {}),
    }


def _seen(
    samples: PreparedSamples, cache: Features | None, max_length: int, pixels: PixelShelf | None, figures: Figures
) -> dict[str, Any]:
    """What the summary says of the data. Every rank must call it."""
    (reads, hits), _ = over_ranks(list(figures.pixels), 0.0)
    return {
        "data": asdict(samples.report),
        "world_size": world_size(),
        "features_cached": cache is not None,
        **features_summary(cache),
        **pixels_summary(pixels, reads, hits),
        **({"clips_encoded": cache.clips.computed} if isinstance(cache, MixedFeatures) else {}),
        **({"remarks": [samples.report.left_out(max_length)]} if samples.report.dropped else {}),
    }


def _commits(loaded: LoadedModel) -> dict[str, str]:
    """Commits of the hub repositories that weights were read from, as transformers resolved them."""
    model = loaded.model
    configs = {"llm": model.config, "vision_tower": cast(PreTrainedModel, model.vision_tower.encoder).config}
    found = {part: getattr(config, "_commit_hash", None) for part, config in configs.items()}
    return {part: commit for part, commit in found.items() if commit}


def begin_plainly(
    job: StageJob[TrainStage], device: torch.device
) -> tuple[LoadedModel, PreparedSamples, SeenImages, dict[str, PartTuning]]:
    """What a training starts from, for whoever computes its steps in another way: model, samples and images; on one rank."""
    loaded = _start_model(job, _own_start(job), llm_weights=True)
    _, tuning, _ = _to_device(job, loaded, device)
    images = SeenImages.of(job, loaded)
    samples = PreparedSamples(outputs_of(job, "prepared"), images.tokens, job.spec.max_length, job.settings.max_dropped)
    return loaded, samples, images, tuning


@contextmanager
def _no_reader_left() -> Iterator[None]:
    """Kill what the block started to read samples and is still there: it heeds no gentler signal, and Python would wait."""
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        for child in multiprocessing.active_children():
            if child not in before:
                child.kill()


def build_trainer(
    job: StageJob[TrainStage],
    loaded: LoadedModel,
    samples: PreparedSamples,
    images: SeenImages,
    cache: Features | None,
    pixels: PixelShelf | None,
    device: torch.device,
) -> MeasuredTrainer:
    """Wire model, data and launch settings to the Trainer."""
    spec, launch = job.spec, job.settings.launch
    sampler, steps = _sampler(job, samples, on_gpu=device.type != "cpu")
    arguments = training_arguments(
        spec,
        launch,
        job.settings.tracking,
        job.settings.trainer,
        job.folder,
        steps,
        sampler.accumulation,
        use_cpu=device.type == "cpu",
        readers=num_readers(launch, on_gpu=device.type != "cpu", cached=cache is not None),
    )
    if (
        world_size() > 1 or arguments.parallel_mode == ParallelMode.DISTRIBUTED
    ):  # DDP, which torchrun's only rank has too
        loaded.model.blank_image = _blank_image(launch.sharding, cache)
    if launch.checkpoints:
        enable_checkpointing(loaded.model)
    ranks = Ranks(world_size(), launch.sharding)
    tune = spec.tune.model_dump(mode="json", exclude_none=True)
    cost = Cost(parts_of(loaded), tune, cache is not None, Peak.here(device, spec.precision))
    if not _spreads_llm(job) and compiles(
        launch.compile, device, _least_seconds(cost, samples, steps * spec.global_batch)
    ):
        log.info("%d blocks are compiled", compile_blocks(loaded.model))
    trainer = MeasuredTrainer(
        figures=Figures(cost, job.after_s),
        model=loaded.model,
        args=arguments,
        dataset=samples,
        sampler=sampler,
        collate=Counted(_collate(job, loaded, images, cache, device), images.tokens, spec.max_length, pixels),
        checkpoints=CheckpointFolder(
            job.folder / CHECKPOINT_FOLDER, launch.keep_checkpoints, job.digest, ranks, job.metrics
        ),
        learning_rates=peak_learning_rates(spec.lr),
        schedule=SaveSchedule(launch.save_steps, 60.0 * launch.save_minutes),
        step_timeout_s=launch.step_timeout_s,
        save_timeout_s=launch.save_timeout_s,
        same_modules=launch.sharding == 3 and world_size() > 1,
        spreads=_spreads_llm(job),
        callbacks=[MetricsRow(job.metrics.append, cost.peak.title)],
    )
    if bool(launch.sharding) != trainer.is_deepspeed_enabled:
        raise RuntimeError(
            f"launch.deepspeed_stage is {launch.sharding}, but the Trainer runs {trainer.accelerator.distributed_type}"
        )
    return trainer


def _least_seconds(cost: Cost, samples: PreparedSamples, count: int) -> float | None:
    """How long so many samples take at the devices' full rate; None where that is not known."""
    lengths = samples.lengths.astype(float)
    flops = cost.flops(count, count * lengths.mean(), count * (lengths**2).mean(), 0.0, count) if len(lengths) else None
    rate = cost.peak.measured or cost.peak.sheet
    return None if flops is None or rate is None else flops / rate


def _sampler(job: StageJob[TrainStage], samples: PreparedSamples, on_gpu: bool) -> tuple[StepSampler, int]:
    """Which samples this rank sees when, and how many steps that is.

    Raises:
        DataError: none at all.
    """
    spec, launch = job.spec, job.settings.launch
    mixture = _mixture(job, samples)
    if not len(mixture):
        raise DataError("the mixture's weights leave no sample to train on; raise them")
    steps = num_steps(len(mixture), spec.global_batch, spec.epochs, spec.max_steps)
    micro_batch = None if launch.micro_batch == "auto" else launch.micro_batch
    per_step = (spec.global_batch, spec.epochs, spec.seed, micro_batch)
    ranks_of = (rank(), world_size(), mixture.epoch)
    return StepSampler(len(mixture), steps, *per_step, *ranks_of, samples.lengths, launch.positions(on_gpu)), steps


def _mixture(job: StageJob[TrainStage], samples: PreparedSamples) -> Mixture:
    return Mixture(samples.sizes, job.spec.mixture or [1.0] * len(samples.sizes))


def _passes(job: StageJob[TrainStage], samples: PreparedSamples) -> float:
    """How often each sample is seen, where a step limit ends the training before its epochs do less often."""
    spec, count = job.spec, max(1, len(_mixture(job, samples)))
    steps = num_steps(count, spec.global_batch, spec.epochs, spec.max_steps)
    return min(spec.epochs, steps * spec.global_batch / count)


def _blank_image(deepspeed_stage: int | None, cache: Features | None) -> Literal["connector", "tower"]:
    """Through what a blank image goes where a rank has none: ZeRO-3 gathers weights in each module run, frozen ones too."""
    return "tower" if cache is None and deepspeed_stage == 3 else "connector"


def _collate(
    job: StageJob[TrainStage], loaded: LoadedModel, images: SeenImages, cache: Features | None, device: torch.device
) -> Collator | WithFeatures:
    """Return what makes batches of samples: with their images, or with the features that a frozen tower gave them."""
    spec, launch, packs = job.spec, job.settings.launch, loaded.model.packs
    if launch.packing and not packs:
        log.info("packing is off: samples that share a row would see each other in %s", type(loaded.model.llm).__name__)
    collator = Collator(
        image_tokens=images.tokens,
        pad_id=int(loaded.tokenizer.pad_token_id),
        row_tokens=_row_length(launch, spec, loaded),
        packing=launch.packing and packs,
        image=_pixels(images, loaded, spec.precision, device) if cache is None else None,
        max_length=spec.max_length,
        size=images.size if loaded.model.tiled else None,
        frames=images.frames_if_any,
    )
    return collator if cache is None else WithFeatures(collator, cache)


def _pixels(images: SeenImages, loaded: LoadedModel, precision: str, device: torch.device) -> Callable[[str], Tensor]:
    """What gives an image's pixels: in bf16 where the tower rounds them so before it does anything, which halves their way."""
    plain = type(loaded.model.vision_tower) is HFVisionTower
    return images.narrow_pixels if plain and precision == "bf16" and device.type == "cuda" else images.pixels


def _row_length(launch: LaunchSpec, spec: TrainStage, loaded: LoadedModel) -> int:
    """Positions of a packed row at most: all of a micro-batch, where each sample is attended to by itself.

    A mask has an entry for every two positions of a row, so that rows with one are no longer than samples.
    """
    if loaded.model.by_samples and (launch.micro_batch == "auto" or launch.row_tokens == "auto"):
        return END_TO_END
    if launch.row_tokens == "auto":
        return spec.max_length
    return launch.row_tokens if launch.micro_batch != "auto" else min(launch.row_tokens, spec.max_length)


def _to_device(
    job: StageJob[TrainStage], loaded: LoadedModel, device: torch.device
) -> tuple[dict[str, Path], dict[str, PartTuning], dict[str, torch.Tensor]]:
    """Say what of the model is trained, and move it to the device, what is frozen in the stage's precision.

    Returns the folders of parts that stay as they are, what was decided for each part, and frozen tensors to save.
    """
    spec, model = job.spec, loaded.model
    kept = kept_parts(loaded, spec.tune, job.parents, job.folder, StoreLayout(job.store))
    model.vision_tower.to(device)
    model.connector.to(device)
    tuning = apply_tuning(model, spec.tune, spec.seed, spec.precision, device)
    for part, decision in tuning.items():
        log.info(
            "%s: %s (%s of %s parameters trained)", part, decision.mode, f"{decision.trained:,}", f"{decision.total:,}"
        )
    if spec.fp8:
        held = hold_in_eight_bits(model.llm, adaptable_linears(model, "llm"))
        log.info("%d frozen linear layers of the LLM are held in eight-bit floats, which is not exact", held)
    saves = rank() == 0 or not _spreads_llm(job)
    frozen = frozen_in_trained_parts(model, kept) if job.settings.launch.sharding and saves else {}
    if not _spreads_llm(job):
        cast_frozen(model, kept, spec.precision, device)
        model.to(device)
    return kept, tuning, frozen


def _spreads_llm(job: StageJob[TrainStage]) -> bool:
    """Whether the LLM waits for `spread`. One that is quantised has to be whole first, and moves to the device as it is."""
    tune = job.spec.tune.llm
    quantised = isinstance(tune, TuneHow) and tune.qlora is not None
    return job.settings.launch.sharding == 3 and world_size() > 1 and not quantised


def _own_start(job: StageJob[TrainStage]) -> Path | None:
    """This stage's own copy of the model folder that it starts from, if it starts from one outside the store."""
    return own_copy(Path(job.settings.folders["from"]), job.folder, StoreLayout(job.store)) if job.spec.model else None


def _start_model(job: StageJob[TrainStage], start: Path | None, llm_weights: bool) -> LoadedModel:
    """Return the model this stage starts from, as the stage sees images and clips."""
    loaded = _first_model(job, start, llm_weights)
    if job.spec.image_mode is not None:
        set_image_mode(loaded, job.spec.image_mode, job.spec.seed)
    if job.spec.sampling is not None:
        loaded.description = loaded.description.with_sampling(job.spec.sampling)
    return loaded


def _first_model(job: StageJob[TrainStage], start: Path | None, llm_weights: bool) -> LoadedModel:
    """Return a model of an earlier stage, the one at `start`, or one put together from parts."""
    spec, parents, folders = job.spec, job.parents, job.settings.folders
    trust, attention = job.settings.trust, job.settings.launch.attention
    if "from" in parents:
        return load_model(parents["from"] / MODEL_FOLDER, trust, attention, llm_weights)
    if start is not None:
        return load_model(start, trust, attention, llm_weights)
    assert spec.connector is not None and spec.tower_output is not None and spec.chat_template is not None
    llm = part_source(PartIdentity, spec.llm, parents.get("llm"), folders.get("llm"))
    tower = part_source(TowerIdentity, spec.vision_tower, parents.get("vision_tower"), folders.get("vision_tower"))
    template, scaled = spec.chat_template, spec.scale_image_features
    model = build_lmm(
        llm, tower, spec.connector, spec.tower_output, template, spec.seed, trust, attention, scaled, llm_weights
    )
    tokenizer = load_tokenizer(spec.tokenizer, parents.get("tokenizer"), folders.get("tokenizer"))
    parts = (llm.identity, tower.identity, spec.tower_output, spec.connector)
    description = ModelDescription.of(*parts, template, scaled)
    return LoadedModel(model, tokenizer, description, None)
