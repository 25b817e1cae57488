"""The house: modules import only downwards, in no circle, and the fast side stays fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src/tinylmm"
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
    "convert": {"generation", "models", "data", "config", "sizing", "store"},
    "reports": {"planning", "evaluation", "models", "data", "config", "sizing", "store"},
    "stages": {"training", "planning", "evaluation", "generation", "models", "data", "config", "sizing", "store"},
    "launch": {"stages", "planning", "config", "store"},
    "cli": {
        "launch",
        "stages",
        "reports",
        "convert",
        "planning",
        "evaluation",
        "generation",
        "data",
        "config",
        "store",
    },
}
"""Room -> rooms that it may import."""


def modules() -> dict[str, Path]:
    """Dotted name below `tinylmm` -> file."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of ours that a module imports anywhere in it, also inside functions; not those for type checkers alone."""
    known = modules()
    found: set[str] = set()
    for node in _nodes(ast.parse(known[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinylmm":
            base = node.module.removeprefix("tinylmm").removeprefix(".")
            inner = {f"{base}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {one if one in known else base for one in inner}
        elif isinstance(node, ast.Import):
            found |= {alias.name.removeprefix("tinylmm.") for alias in node.names if alias.name.startswith("tinylmm.")}
    return frozenset(found - {name})


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from _nodes(node)


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
    rooms = {name.partition(".")[0] for name, path in modules().items() if path.parent != SOURCE}
    assert rooms == set(BELOW)


@pytest.mark.parametrize(
    "module",
    [
        "tinylmm",
        "tinylmm.cli",
        "tinylmm.cli.main",
        "tinylmm.cli.train",
        "tinylmm.config.compose",
        "tinylmm.planning.planner",
        "tinylmm.store.store",
    ],
)
def test_the_fast_side_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
