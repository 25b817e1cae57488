"""Folders that users and scripts spell differently."""

from __future__ import annotations

from pathlib import Path

from tinylmm.evaluation.benchmarks.files import Place


def place_of(root: Path, get: str, *folders: str) -> Place:
    """A `Place` whose folder is the first of `folders` that is there, or that `root` itself is called; else the first."""
    found = next((name for name in folders if root.name == name or (root / name).is_dir()), folders[0])
    return Place(root, found, get)
