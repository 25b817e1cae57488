"""The fast side stays fast, and modules import only in the direction of the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
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
ALLOWED = {
    "errors": set(),
    "integrity": {"errors"},
    "stop": {"errors"},
    "config": {"errors"},
    "data": {"config", "errors"},
    "models": {"config", "errors"},
    "training": {"models", "data", "config", "errors", "integrity", "stop"},
    "evaluation": {"models", "data", "config", "errors", "stop"},
    "stages": {"training", "evaluation", "models", "data", "config", "errors", "integrity", "stop"},
    "importing": {"models", "data", "config", "errors"},
    "export": {"importing", "inference", "models", "data", "config", "errors"},
    "inference": {"models", "data", "config", "errors", "integrity", "stages"},
    "launch": {"stages", "config", "errors", "stop", "integrity"},
    "reports": {"evaluation", "stages", "data", "config", "errors", "integrity"},
    "cli": {
        "launch",
        "stages",
        "evaluation",
        "reports",
        "importing",
        "export",
        "inference",
        "data",
        "config",
        "errors",
    },
}
EXCEPTIONS = {("config/checks.py", "data")}
"""`checks.py` reads the table of template names from data/chat.py, which loads nothing."""


def imported(path: Path) -> set[str]:
    """Top-level folders of tinylmm that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tinylmm":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("tinylmm.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_imports_follow_the_direction(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    layer = relative.parts[0].removesuffix(".py")
    if layer == "__init__":
        return
    wrong = imported(path) - ALLOWED[layer] - {layer}
    assert not {name for name in wrong if (relative.as_posix(), name) not in EXCEPTIONS}


@pytest.mark.parametrize(
    "module",
    [
        "tinylmm",
        "tinylmm.cli",
        "tinylmm.cli.main",
        "tinylmm.cli.train",
        "tinylmm.config.compose",
        "tinylmm.planning.planner",
    ],
)
def test_the_fast_side_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
