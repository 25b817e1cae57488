"""Makes the environments that other programs run in, once; torch is borrowed, as it is gigabytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

HERE = Path(__file__).parent
PLACE = Path(sys.prefix) / "environments"


def python_with(name: str) -> str:
    """The Python of an environment with the packages of `<name>.txt`, in front of those that these tests run with.

    Skips the test where pip cannot install them: without a package registry there is no other program to ask.
    """
    folder, wanted = PLACE / name, (HERE / f"{name}.txt").read_text(encoding="utf-8")
    stamp = folder / "installed.txt"
    PLACE.mkdir(exist_ok=True)
    with FileLock(PLACE / f"{name}.lock"):
        if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            pip = [
                str(folder / "bin/python"),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--requirement",
                str(HERE / f"{name}.txt"),
            ]
            done = subprocess.run(pip, capture_output=True, text=True, timeout=500)
            if done.returncode:
                pytest.skip(f"pip cannot install {name}: {done.stderr.strip().splitlines()[-1:]}")
            packages = next((folder / "lib").glob("python*/site-packages"))
            (packages / "zz_borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n", encoding="utf-8")
            stamp.write_text(wanted, encoding="utf-8")
    return str(folder / "bin/python")
