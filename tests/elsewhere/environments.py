"""Makes the environments that other programs run in, once; torch is borrowed, as it is gigabytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).parent
PLACE = Path(sys.prefix) / "environments"


def python_with(name: str, finish: Callable[[str, Path], None] = lambda python, packages: None) -> str:
    """The Python of an environment with the packages of `<name>.txt`, in front of those that these tests run with.

    Skips the test where pip cannot install them: without a package registry there is no other program to ask.

    Args:
        name: of the file and of the environment.
        finish: does what pip cannot, given the Python and the folder of its packages.
    """
    folder, wanted = PLACE / name, (HERE / f"{name}.txt").read_text(encoding="utf-8")
    stamp, python = folder / "installed.txt", str(folder / "bin/python")
    PLACE.mkdir(exist_ok=True)
    with FileLock(PLACE / f"{name}.lock"):
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            packages = next((folder / "lib").glob("python*/site-packages"))
            # before pip runs, which takes what is there and fits
            (packages / "zz_borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
            pip = [python, "-m", "pip", "install", "--quiet", "--requirement", str(HERE / f"{name}.txt")]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=1800)
            if done.returncode:
                pytest.skip(f"pip cannot install {name}: {done.stderr.strip().splitlines()[-1:]}")
            finish(python, packages)
            stamp.write_text(wanted, encoding="utf-8")
    return python


def vllm_python() -> str:
    """The Python of an environment with vLLM for CPUs."""

    def finish(python: str, packages: Path) -> None:
        """Take out of the environment what is on PyPI for GPUs alone: here it cannot be loaded."""
        pip = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec", "triton"]
        subprocess.run(pip, check=True, capture_output=True)
        # of torchvision vLLM imports what is Python; this module alone wants the compiled operators
        (packages / "torchvision/_meta_registrations.py").write_text("", encoding="utf-8")

    return python_with("vllm", finish)


def node_with(name: str) -> dict[str, str]:
    """Variables with which node finds the packages of `<name>.json`, and no others.

    Skips the test where there is no node, or npm cannot install them.
    """
    folder, wanted = PLACE / name, (HERE / f"{name}.json").read_text(encoding="utf-8")
    package = folder / "package.json"
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        pytest.skip("there is no node")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(PLACE / f"{name}.lock"):
        if not package.exists() or package.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(folder)
            folder.mkdir()
            draft = folder / "draft"  # package.json is there only once its packages are
            draft.mkdir()
            (draft / "package.json").write_text(wanted, encoding="utf-8")
            options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
            done = subprocess.run([npm, "install", *options], cwd=draft, capture_output=True, text=True, timeout=500)
            if done.returncode:
                pytest.skip(f"npm cannot install {name}: {done.stderr.strip().splitlines()[-1:]}")
            (draft / "node_modules").rename(folder / "node_modules")
            shutil.rmtree(draft)
            package.write_text(wanted, encoding="utf-8")
    return {"NODE_PATH": str(folder / "node_modules")}
