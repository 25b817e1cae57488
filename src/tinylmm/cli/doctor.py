"""`tinylmm doctor`: what is installed, what the machine can do, which fast paths are active, and what would be faster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from tinylmm.cli.terminal import echo, echo_json, terminal

GIB = 2**30


def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure matrix products, copies and image reading (under a minute).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is installed, what this machine can do, and what would make it faster."""
    from tinylmm.stages.doctor import examine

    if calibrate:
        from tinylmm.stages.calibrate import calibrate_and_keep

        echo(f"measured and kept in {calibrate_and_keep()}", err=True)
    found = examine(Path(os.environ.get("TINYLMM_STORE", "store")))
    if as_json:
        echo_json(found)
    else:
        _show(terminal(highlight=False), found)


def _show(console: Console, found: dict[str, Any]) -> None:
    machine = found["machine"]
    console.print(f"tinylmm {found['tinylmm']}, Python {found['python']}, {found['system']}")
    packages = ", ".join(f"{name} {number or 'missing'}" for name, number in found["packages"].items())
    console.print(f"packages: {packages}")
    console.print(
        f"machine: {machine['cores']} of {machine['cores_in_all']} cores, {machine['memory'] / GIB:.1f} GiB of memory, "
        f"{machine['shared_memory'] / GIB:.1f} GiB of shared memory"
    )
    for gpu in machine["gpus"]:
        known = f"launch.gpu={gpu['launch.gpu']}" if gpu["launch.gpu"] else "in no table: calibrate it"
        console.print(f"GPU: {gpu['name']}, {gpu['memory'] / GIB:.1f} GiB ({known})")
    for path, free in machine["disks"].items():
        console.print(f"disk: {free / GIB:.1f} GiB free at {path}")
    console.print("fast paths:")
    for path in found["fast_paths"]:
        mark = Text("  on   ", "green") if path["active"] else Text("  off  ", "yellow")
        console.print(Text.assemble(mark, f"{path['name']}: {path['why']}"))
    _show_calibration(console, found["calibration"])
    for sentence in found["faster"]:
        console.print(f"faster: {sentence}")


def _show_calibration(console: Console, measured: dict[str, Any] | None) -> None:
    if measured is None:
        console.print("not measured yet: tinylmm doctor --calibrate, and plans reckon with this machine's own rates")
        return
    console.print(
        f"measured of {measured['device']}: {measured['matmul_flops'] / 1e12:.3g} TFLOP/s of products, "
        f"{measured['copy_bytes'] / 1e9:.3g} GB/s of copies, {measured['images_per_s']:.3g} images a second in one process"
    )
