"""Weight files of other tools as named tensors, and the ledger that proves each one was used exactly once.

Nothing here runs code from a file: safetensors hold none, and old pickles pass PyTorch's `weights_only` unpickler or are
refused.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tinylmm.config.weight_files import refuse_pointer
from tinylmm.errors import DataError, UserError

Tensors = dict[str, Tensor]
NAMES_SHOWN = 20
SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
"""transformers' names of a folder's weights, in the order in which it looks for them."""


def read_weights(folder: Path) -> Tensors:
    """Read the weights of a Hugging Face style folder: one file or shards, safetensors or pickles.

    Raises:
        DataError: there are none, a shard is missing or damaged, or index and shards disagree.
        UserError: a pickle holds more than plain tensors.
    """
    found = _weight_file(folder)
    if found is None:
        raise DataError(f"{folder} holds no weights: looked for {SAFETENSORS}, {PICKLE} and their .index.json.")
    return _read_shards(found) if found.suffix == ".json" else read_file(found)


def has_weights(folder: Path) -> bool:
    """Whether `read_weights` would find a file."""
    return _weight_file(folder) is not None


def _weight_file(folder: Path) -> Path | None:
    names = (f"{SAFETENSORS}.index.json", SAFETENSORS, f"{PICKLE}.index.json", PICKLE)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_file(path: Path) -> Tensors:
    """Read one file of named tensors onto the CPU, in its own dtypes.

    Raises:
        DataError: the file is missing or damaged.
        UserError: it is a pickle with more in it than plain tensors.
    """
    if not path.is_file():
        raise DataError(f"{path} is missing.")
    refuse_pointer(path)
    if path.suffix != Path(SAFETENSORS).suffix:
        return _read_pickle(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} is damaged or no safetensors file ({error}). Fetch it again.") from error


def _read_pickle(path: Path) -> Tensors:
    try:
        # Only zip archives (torch >= 1.6) can be mapped; a legacy pickle is read whole.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for `{named[1]}`" if named else str(error).splitlines()[0]
        raise UserError(
            f"{path} is refused: a file of weights holds plain tensors only, but {what}, which could run code. "
            "Get the weights as safetensors from a source you trust."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{path} is damaged or no PyTorch file ({str(error).splitlines()[0]}). Fetch it again."
        ) from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dict of named tensors.")
    other = [str(name) for name, value in loaded.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if other:
        raise UserError(f"{path} holds entries that are no tensors: {listed(other)}. Expected a plain state dict.")
    return {name: value.detach() for name, value in loaded.items()}


def _read_shards(index: Path) -> Tensors:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        if not all(isinstance(shard, str) and Path(shard).name == shard for shard in shards):
            raise ValueError("a shard's name is no plain file name")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{index} is no index of shards ({error}). Fetch it again.") from error
    tensors: Tensors = {}
    for shard in shards:
        found = read_file(index.parent / shard)
        if twice := sorted(set(found) & set(tensors)):
            raise DataError(f"{index.parent / shard} repeats tensors of another shard: {listed(twice)}.")
        tensors |= found
    if differing := sorted(set(weight_map) ^ set(tensors)):
        raise DataError(f"{index} and its shards do not name the same tensors: {listed(differing)}.")
    return tensors


class Ledger:
    """Named tensors of a checkpoint of which each is to be used exactly once.

    Args:
        tensors: name -> tensor.
        source: what to call the checkpoint in errors.
    """

    def __init__(self, tensors: Tensors, source: str) -> None:
        self.source = source
        self.ignored: dict[str, str] = {}
        self._left = dict(tensors)

    def has(self, prefix: str) -> bool:
        """Whether a tensor that was not taken yet begins with `prefix`."""
        return any(name.startswith(prefix) for name in self._left)

    def take(self, prefix: str, to: str = "") -> Tensors:
        """Take every tensor left that begins with `prefix`, with `to` in its place; may be none."""
        names = [name for name in self._left if name.startswith(prefix)]
        return {to + name.removeprefix(prefix): self._left.pop(name) for name in names}

    def put(self, tensors: Tensors) -> None:
        """Give taken tensors back under new names, to be taken again.

        Raises:
            UserError: a name is there already.
        """
        if twice := sorted(set(tensors) & set(self._left)):
            raise UserError(f"{self.source} holds tensors twice: {listed(twice)}.")
        self._left |= tensors

    def ignore(self, pattern: str, reason: str) -> None:
        """Leave out the tensors whose whole name matches `pattern` (a regular expression), and record why."""
        for name in [name for name in self._left if re.fullmatch(pattern, name)]:
            self.ignored[name] = reason
            del self._left[name]

    def finish(self) -> None:
        """Prove that nothing is left.

        Raises:
            UserError: tensors were not used; each is named.
        """
        if self._left:
            raise UserError(
                f"{self.source} holds {len(self._left)} tensors that no part of the model uses: "
                f"{listed(sorted(self._left))}. Nothing was written. Is it of another layout (--layout)?"
            )


def listed(names: list[str], shown: int = NAMES_SHOWN) -> str:
    """Join names for a message: the first ones, and how many more."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
