"""Writing GGUF files: the package that does it, the types of tensors, and the names of those types.

GGUF is the format of llama.cpp (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). The package `gguf` is an extra of
ours, so it is imported here alone, where a file is written.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinylmm.errors import UserError

Q8_0 = "q8_0"
"""The one quantisation: blocks of 32 weights in 8 bits with an fp16 scale each."""
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16", "Q8_0": "MOSTLY_Q8_0"}


def gguf_package() -> Any:
    """Import the package `gguf`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise UserError(
            "export --to gguf writes its files with the package gguf, which is not installed here. "
            "Install it: pip install 'tinylmm[gguf]'."
        ) from error


def type_name(dtype: torch.dtype, quantization: str | None) -> str:
    """GGUF's name of how large tensors are stored."""
    return quantization.upper() if quantization else _TYPES[dtype]


class GGUFFile:
    """One file in the making.

    Args:
        path: where it shall lie.
        architecture: llama.cpp's name.
        stored: how tensors of two dimensions and more are stored: F32, F16, BF16 or Q8_0. Vectors, whose precision costs
            nothing, are stored in F32; so is what `add_tensor` is told to, and rows that Q8_0 cannot hold are in F16.
    """

    def __init__(self, path: Path, architecture: str, stored: str) -> None:
        self._gguf = gguf_package()
        self.writer = self._gguf.GGUFWriter(path, architecture)
        self.writer.add_file_type(int(self._gguf.LlamaFileType[_FILE_TYPES[stored]]))
        if stored == "Q8_0":
            self.writer.add_quantization_version(self._gguf.GGML_QUANT_VERSION)
        self.stored = stored
        self.tensors = 0

    def add_tensor(self, name: str, tensor: torch.Tensor, stored: str | None = None) -> None:
        """Add a tensor; `stored` overrides the file's type."""
        data = tensor.detach().to(torch.float32).contiguous().numpy()
        stored = stored or (self.stored if data.ndim > 1 else "F32")
        block = self._gguf.GGML_QUANT_SIZES[self._gguf.GGMLQuantizationType[stored]][0]
        if data.shape[-1] % block:
            stored = "F16"
        kind = self._gguf.GGMLQuantizationType[stored]
        plain = stored in ("F32", "F16")
        written = self._gguf.quants.quantize(np.ascontiguousarray(data), kind)
        self.writer.add_tensor(name, written, raw_dtype=None if plain else kind)
        self.tensors += 1

    def close(self) -> None:
        """Write the file."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
