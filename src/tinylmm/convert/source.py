"""What a reader is given: the checkpoint's folder, base parts, and what the user says about it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinylmm.convert.tensors import Tensors, read_weights
from tinylmm.errors import DataError, UserError

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
"""peft's, beside an adapter's weights."""


@dataclass
class Source:
    """A checkpoint to import: what a reader is given, and adds its notes to.

    Attributes:
        folder: where it lies.
        config: its config.json, {} if it has none.
        llm, tower: local folders of base parts, for layouts that hold only what was trained.
        template: the chat template's name, None to derive it.
        notes: what the user should know about the result, one sentence each.
        ignored: tensors that are left out on purpose -> why.
    """

    folder: Path
    config: dict[str, Any]
    llm: Path | None = None
    tower: Path | None = None
    template: str | None = None
    notes: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """What config.json says the model is, "" if it does not."""
        return str(self.config.get("model_type", ""))

    @property
    def architectures(self) -> list[str]:
        """Names of the classes that config.json says."""
        return [str(name) for name in self.config.get("architectures") or []]

    @property
    def has_adapter(self) -> bool:
        """Whether there is a peft adapter."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    def base_folder(self, role: str, name: str) -> Path:
        """Return the given folder of a base part.

        Args:
            role: "llm" or "tower", the option's name.
            name: what the checkpoint calls the part it was trained on.

        Raises:
            UserError: the option was not given.
        """
        folder = self.llm if role == "llm" else self.tower
        if folder is None:
            what = {"llm": "language model", "tower": "vision tower"}[role]
            raise UserError(
                f"{self.folder} does not hold its {what}, only what was trained on top of it ('{name}'). "
                f"Give a local folder of it: --{role} FOLDER."
            )
        return folder

    def base_tensors(self, role: str, name: str) -> tuple[dict[str, Any], Tensors]:
        """Return config.json and weights of a base part.

        Raises:
            UserError: the option was not given.
            DataError: the folder lacks config.json or weights.
        """
        folder = self.base_folder(role, name)
        self.notes.append(f"the {role} is the base part in {folder}")
        return read_json(folder / CONFIG), read_weights(folder)

    def part_config(self, role: str) -> dict[str, Any] | None:
        """Return config.json of a base part that was given, else None."""
        folder = self.llm if role == "llm" else self.tower
        return None if folder is None else read_json(folder / CONFIG)


def open_source(folder: Path, llm: Path | None, tower: Path | None, template: str | None) -> Source:
    """Check the folders and read config.json.

    Raises:
        DataError: a folder does not exist, or config.json is no JSON object.
    """
    for name, path in (("SOURCE", folder), ("--llm", llm), ("--tower", tower)):
        if path is not None and not path.is_dir():
            raise DataError(f"{name}: {path} is no folder. Give a local folder; nothing is downloaded.")
    return Source(folder, read_json_if_any(folder / CONFIG), llm, tower, template)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: it is missing or something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON ({getattr(error, 'strerror', None) or error}).") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Read a JSON object, {} if there is no such file."""
    return read_json(path) if path.is_file() else {}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as every file of ours is written."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
