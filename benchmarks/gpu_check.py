"""Train a few steps of stage 1 and stage 2 at Phi-2 + SigLIP shapes with random weights, in bf16 on one GPU.

    make gpu-check

Prints samples/s, model FLOPs utilisation and peak memory, and writes them to benchmarks/results/gpu_check.json. Skipped with
a reason where there is no GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.builders import NoFiles
from tinylmm.config.compose import compose_run
from tinylmm.data.collate import Collator
from tinylmm.models.attention import choose_attention
from tinylmm.models.build import PartSource, build_lmm
from tinylmm.models.lmm import LMM
from tinylmm.models.tuning import apply_tuning
from tinylmm.planning.graph import build_graph
from tinylmm.planning.shapes import shapes_of
from tinylmm.planning.specs import TrainStage
from tinylmm.sizing.flops import Flops, Sample, sample_flops
from tinylmm.sizing.layers import Part
from tinylmm.training.arguments import peak_learning_rates

RESULT = Path(__file__).parent / "results" / "gpu_check.json"
WORDS = ["llm=phi2", "llm.init=random", "vt=siglip", "vision_tower.init=random", "recipe=base", "eval=none"]
PEAK_TFLOPS = {"H200": 790.0, "H100": 790.0, "A100": 312.0}
"""Dense bf16 rates that a large matrix product reaches; measured on an H200, the data sheet's for the A100."""
WARM_UP, STEPS = 3, 10
STAGES: dict[str, dict[str, int]] = {
    "pretrain": {"text_tokens": 45, "supervised": 45, "micro_batch": 16},
    "finetune": {"text_tokens": 271, "supervised": 120, "micro_batch": 8},
}


def main() -> int:
    """Measure both stages; returns the exit code."""
    if not torch.cuda.is_available():
        sys.stdout.write(f"gpu-check skipped: no CUDA GPU was found (torch {torch.__version__})\n")
        return 0
    run = compose_run(WORDS)
    found = [stage for stage in build_graph(run, NoFiles()) if stage.kind == "train"]
    train = {stage.name: TrainStage.model_validate(stage.spec) for stage in found}
    first = next(iter(train.values()))
    assert first.llm and first.vision_tower and first.connector and first.tower_output  # it starts from parts
    with torch.device("cuda"):
        parts = (PartSource(first.llm), PartSource(first.vision_tower), first.connector, first.tower_output)
        model = build_lmm(*parts, template=run.llm.template, seed=0, trust=[])
    model.set_attention(choose_attention("auto", first.precision, torch.device("cuda", torch.cuda.current_device())))
    rows = [measure(model, name, spec, shapes_of(run, name).parts) for name, spec in train.items()]
    record = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "stages": rows}
    RESULT.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        sys.stdout.write(
            f"{row['stage']:9} {row['samples_per_s']:7.1f} samples/s  MFU {row['mfu']:5.1%}  "
            f"peak {row['peak_gib']:5.1f} GiB  loss {row['loss']:.3f}\n"
        )
    return 0


def measure(model: LMM, name: str, spec: TrainStage, shapes: Mapping[str, Part]) -> dict[str, Any]:
    """Time steps of one stage on random samples of its typical length."""
    shape = STAGES[name]
    apply_tuning(model, spec.tune)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else torch.bfloat16)
    rates = peak_learning_rates(spec.lr)
    groups = [
        {"params": [p for p in getattr(model, part).parameters() if p.requires_grad], "lr": rates[part]}
        for part in rates
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], fused=True)
    batch = random_batch(model, shape)
    torch.cuda.reset_peak_memory_stats()
    begin, loss = 0.0, torch.zeros(())
    for step in range(WARM_UP + STEPS):
        if step == WARM_UP:
            torch.cuda.synchronize()
            begin = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            output = model(**batch)
        loss = output.loss_sum / output.num_supervised
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], spec.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    torch.cuda.synchronize()
    rate = STEPS * shape["micro_batch"] / (time.perf_counter() - begin)
    sample = Sample.of_length(shape["text_tokens"] + model.image_tokens, shape["supervised"])
    flops = sum(
        sample_flops(shapes, spec.tune.model_dump(mode="json", exclude_none=True), sample).values(), Flops()
    ).total
    peak = next((v for k, v in PEAK_TFLOPS.items() if k in torch.cuda.get_device_name()), float("nan"))
    return {
        "stage": name,
        "samples_per_s": rate,
        "mfu": rate * flops / (peak * 1e12),
        "tflop_per_sample": flops / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "micro_batch": shape["micro_batch"],
        "loss": float(loss),
    }


def random_batch(model: LMM, shape: dict[str, int]) -> dict[str, Any]:
    """One micro-batch of samples with an image each, packed as in training, on the GPU."""
    size = model.vision_tower.image_size
    vocabulary = model.llm.config.vocab_size
    samples = []
    for number in range(shape["micro_batch"]):
        ids = [-200, *torch.randint(0, vocabulary, (shape["text_tokens"],)).tolist()]
        labels = [-100] * (len(ids) - shape["supervised"]) + ids[-shape["supervised"] :]
        samples.append({"sample_id": str(number), "input_ids": ids, "labels": labels, "images": ["random"]})
    length = shape["text_tokens"] + model.image_tokens
    collator = Collator(model.image_tokens, 0, length, True, lambda name: torch.randn(3, size, size), length)
    made = collator(samples)
    kept = ("input_ids", "position_ids", "targets", "pixel_values")
    return {key: made[key].to("cuda") for key in kept}


if __name__ == "__main__":
    sys.exit(main())
