"""Whether files of weights are whole, as far as their beginnings tell: said before anything is made with them. No torch.

Whoever reads a folder of weights asks here first, so that each says the same.
"""

from __future__ import annotations

import json
from pathlib import Path

from tinylmm.errors import DataError

POINTER = b"version https://git-lfs"
"""How a pointer of git-lfs begins, which `git clone` leaves in a file's place where git-lfs is not installed."""
WEIGHT_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_HEADER_LIMIT = 100_000_000


def refuse_pointer(path: Path) -> None:
    """Refuse a file that is only a pointer to another.

    Raises:
        DataError: it is one; says how to fetch the file.
    """
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise DataError(
                f"{path} is a pointer of git-lfs, not the file itself. Fetch it: `git lfs install && git lfs pull` in its "
                "repository, or `hf download`."
            )


def check_weights(folder: Path) -> None:
    """Refuse a folder with files of weights that are pointers, or that end before what their header promises.

    Raises:
        DataError: names the file, what is wrong with it and what to do.
    """
    for path in sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)}):
        refuse_pointer(path)
        if path.suffix == ".safetensors" and (problem := _unfinished(path)):
            raise DataError(f"{path} is not a whole file of weights: {problem}. Fetch it again.")
    config = folder / "config.json"
    if config.is_file():
        refuse_pointer(config)


def _unfinished(path: Path) -> str | None:
    """What is wrong with a safetensors file: eight bytes with the header's length, the header, the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            return f"its header would be {length:,} bytes long, and the file has {size:,}"
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "its header cannot be read"
    wanted = 8 + length + max(ends, default=0)
    return None if size == wanted else f"its header promises {wanted:,} bytes, and it has {size:,}"
