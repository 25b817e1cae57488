"""The package has one version, wherever one asks for it."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import tinylmm
from tinylmm.store.provenance import software_versions
from tinylmm.version import __version__

ROOT = Path(__file__).parents[2]


def test_package_build_file_and_run_records_say_the_same_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["version"], tinylmm.__version__, software_versions()["tinylmm"]} == {__version__}


def test_no_module_imports_the_package_that_it_is_part_of() -> None:
    # the package's `load` imports most modules in the end: whoever imports the package closes a circle
    found = []
    for path in sorted((ROOT / "src/tinylmm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            found += [path.name] if "tinylmm" in names else []
    assert found == []
