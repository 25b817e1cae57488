"""The sections, in the order in which they run, and the table of techniques."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.gpu_sections.answers import answer
from benchmarks.gpu_sections.kernels import Trace
from benchmarks.gpu_sections.ours import planned_of, train_ours
from benchmarks.gpu_sections.plain import train_plain
from benchmarks.gpu_sections.setting import QUARTER, STAGES, Setting, write_prepared
from tinylmm.planning.choose import fit_of
from tinylmm.sizing.cards import save_calibration
from tinylmm.stages.calibrate import calibrate


@dataclass(frozen=True)
class Technique:
    """One row of the table: the same steps without and with something that makes them faster or smaller.

    Attributes:
        without, with_: words of a run.
        stages: where it plays a part.
        files: whether images are read from their JPEGs.
    """

    name: str
    without: tuple[str, ...]
    with_: tuple[str, ...]
    stages: tuple[str, ...] = STAGES
    files: bool = False


TECHNIQUES = (
    Technique("compiled blocks", ("launch.compile=false",), ("launch.compile=true",)),
    Technique("attention", ("launch.attention=sdpa",), ("launch.attention=auto",)),
    Technique(
        "gradient checkpointing",
        ("launch.gradient_checkpointing=false",),
        ("launch.gradient_checkpointing=true",),
        ("finetune",),
    ),
    Technique("packing", ("launch.packing=false",), ("launch.packing=true",), ("finetune",)),
    Technique(
        "cached tower features", ("launch.cache_features=false",), ("launch.cache_features=true",), ("pretrain",)
    ),
    Technique("readers", ("launch.num_workers=0",), ("launch.num_workers=auto",), ("pretrain",), files=True),
)


COMPARED = ("samples_per_s", "peak_gib", "at_once")
"""Of a row, what stands beside each other in the table."""


def machine(setting: Setting) -> None:
    """What the device can do, measured as `tinylmm doctor --calibrate` does, and kept for the section `planner`."""
    if setting.tiny:
        edge = 256
        one = torch.randn(edge, edge)
        trace = Trace(setting.device)
        trace.begin()
        _ = one @ one
        trace.end()
        setting.say(section="machine", name="cpu", matmul_tflops=2 * edge**3 / max(trace.found["wall_ms"], 1e-3) / 1e9)
        return
    found = calibrate()
    save_calibration(found)
    setting.say(
        section="machine",
        name=found.device,
        memory_gib=found.memory_bytes / 2**30,
        matmul_tflops=found.matmul_flops / 1e12,
        fp32_tflops=found.fp32_flops / 1e12,
        copy_tb_per_s=found.copy_bytes / 1e12,
        images_per_s_and_process=found.images_per_s,
    )


def _short(setting: Setting) -> Setting:
    """With steps of a quarter of the samples: an update of the weights, which all of them share, weighs little there too."""
    return replace(setting, parts=QUARTER)


def steps(setting: Setting) -> None:
    """Our step beside the plain way's, on the same samples, images ready in memory."""
    for llm in setting.llms:
        for stage in STAGES:
            ours = train_ours(setting, llm, stage)
            setting.say(section="steps", side="ours", **ours)
            plain = train_plain(_short(setting), llm, stage, checkpointing=True)
            more = {"ours_is_times": ours["samples_per_s"] / plain["samples_per_s"]}
            setting.say(section="steps", side="plain", **plain, **more)


def unchecked(setting: Setting) -> None:
    """The plain way once more, without gradient checkpointing: faster, where there is memory for it."""
    ours = {(r["llm"], r["stage"]): r for r in setting.rows if r["section"] == "steps" and r["side"] == "ours"}
    for stage in STAGES:
        plain = train_plain(_short(setting), setting.llms[0], stage, checkpointing=False)
        own = ours.get((setting.llms[0], stage))
        more = {} if own is None else {"ours_is_times": own["samples_per_s"] / plain["samples_per_s"]}
        setting.say(section="unchecked", **plain, **more)


def techniques(setting: Setting) -> None:
    """Each technique off and on, everything else as a launch has it by itself."""
    llm, short = setting.llms[0], _short(setting)
    for technique in TECHNIQUES:
        for stage in technique.stages:
            off = train_ours(short, llm, stage, technique.without, technique.files)
            on = train_ours(short, llm, stage, technique.with_, technique.files)
            row = {f"{key}_{name}": one[key] for name, one in (("off", off), ("on", on)) for key in COMPARED}
            setting.say(
                section="techniques",
                technique=technique.name,
                llm=llm,
                stage=stage,
                words={"off": technique.without, "on": technique.with_},
                **row,
                times_as_fast=on["samples_per_s"] / off["samples_per_s"],
                memory_ratio=on["peak_gib"] / off["peak_gib"],
                loss_difference=abs(on["loss"] - off["loss"]),
            )


def trainer(setting: Setting) -> None:
    """The whole way from JPEG files, as a user's run goes it, beside images that wait in memory."""
    llm = setting.llms[0]
    for stage in STAGES:
        files = train_ours(setting, llm, stage, files=True)
        ready = next(
            (r for r in setting.rows if (r["section"], r.get("side"), r.get("stage")) == ("steps", "ours", stage)), None
        ) or train_ours(setting, llm, stage)
        keeps = files["samples_per_s"] / ready["samples_per_s"]
        setting.say(section="trainer", **files, ready_samples_per_s=ready["samples_per_s"], of_ready=keeps)


def planner(setting: Setting) -> None:
    """What `tinylmm plan` predicts of memory and time, beside what the section `steps` measured.

    Tensors are measured on a GPU: what the plan adds for lost pieces and the context stands apart. On a CPU the whole process
    is measured, which at tiny size is not the model's.
    """
    measured = [row for row in setting.rows if row["section"] == "steps" and row["side"] == "ours"]
    if not measured:
        measured = [train_ours(setting, setting.llms[0], stage) for stage in STAGES]
    for row in measured:
        run = setting.compose(row["llm"], *row["words"])
        data = write_prepared(setting, row["stage"], int(run.llm.architecture["vocab_size"]))
        planned = planned_of(setting, run, row["stage"], data)
        own = fit_of(planned)
        gib, lost = own.memory.total / 2**30, own.memory.fragmentation / 2**30
        seconds = planned.seconds_a_step(own.placed)
        setting.say(
            section="planner",
            llm=row["llm"],
            stage=row["stage"],
            predicted_gib=gib,
            predicted_lost_gib=lost,
            measured_gib=row["peak_gib"],
            memory_ratio=(gib - lost) / row["peak_gib"],
            predicted_s=seconds,
            measured_s=row["seconds_a_step"],
            time_ratio=None if seconds is None else seconds / row["seconds_a_step"],
        )


def kernels(setting: Setting) -> None:
    """Where an optimiser step's time goes on the device."""
    for stage in STAGES:
        trace = Trace(setting.device)
        row = train_ours(_short(setting), setting.llms[0], stage, trace=trace)
        setting.say(section="kernels", **{key: row[key] for key in ("llm", "stage", "at_once")}, **trace.found)


SECTIONS: dict[str, Callable[[Setting], None]] = {
    "machine": machine,
    "steps": steps,
    "generation": answer,
    "trainer": trainer,
    "kernels": kernels,
    "planner": planner,
    "techniques": techniques,
    "unchecked": unchecked,
}
"""By the names that `benchmarks/gpu.py` gives their limits."""
