"""The house: modules import only downwards, in no circle, and the fast side stays fast."""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

from docs.architecture import PICTURE, draw, imports, modules, rooms

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "deepspeed",
    "accelerate",
    "peft",
    "PIL",
    "matplotlib",
    "sklearn",
    "wandb",
)

GROUND = {"errors", "constants", "version", "stop"}
"""Modules that every room may use; among themselves in this order."""
BELOW: dict[str, set[str]] = {
    "sizing": set(),
    "store": set(),
    "config": {"sizing", "store"},
    "data": {"config", "sizing", "store"},
    "models": {"config", "sizing", "store"},
    "generation": {"models", "data", "config", "store"},
    "evaluation": {"generation", "models", "data", "config", "sizing", "store"},
    "planning": {"evaluation", "data", "config", "sizing", "store"},
    "training": {"planning", "models", "data", "config", "sizing", "store"},
    "serving": {"generation", "data", "config"},
    "demo": {"serving", "reports", "evaluation", "generation", "data", "store"},
    "convert": {"generation", "models", "data", "config", "sizing", "store"},
    "reports": {"planning", "evaluation", "models", "data", "config", "sizing", "store"},
    "stages": {"training", "planning", "evaluation", "generation", "models", "data", "config", "sizing", "store"},
    "launch": {"stages", "planning", "config", "store"},
    "verification": {"launch", "stages", "training", "planning", "models", "data", "config", "store"},
    "cli": {
        "verification",
        "launch",
        "stages",
        "reports",
        "convert",
        "demo",
        "serving",
        "planning",
        "evaluation",
        "generation",
        "data",
        "config",
        "store",
    },
}
"""Room -> rooms that it may import."""


@pytest.mark.parametrize("name", sorted(set(modules()) - {""}))
def test_a_module_imports_only_rooms_below_its_own(name: str) -> None:
    room = name.partition(".")[0]
    allowed = {room} | GROUND | BELOW.get(room, set())
    assert {other.partition(".")[0] for other in imports(name)} - allowed - {""} == set()


def test_no_circle_of_imports_exists_anywhere() -> None:
    graph = {name: imports(name) for name in modules()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_rooms_themselves_form_no_circle() -> None:
    TopologicalSorter(BELOW).prepare()
    assert set(rooms()) == set(BELOW)


def test_the_picture_of_the_rooms_is_that_of_the_code() -> None:
    assert PICTURE.read_text(encoding="utf-8") == draw(), "run `make docs`"


@pytest.mark.parametrize(
    "module",
    [
        "tinylmm",
        "tinylmm.cli",
        "tinylmm.cli.main",
        "tinylmm.cli.train",
        "tinylmm.config.compose",
        "tinylmm.planning.planner",
        "tinylmm.planning.estimates",
        "tinylmm.cli.doctor",
        "tinylmm.cli.estimate",
        "tinylmm.store.store",
    ],
)
def test_the_fast_side_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
