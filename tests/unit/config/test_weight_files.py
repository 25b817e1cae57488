"""Files of weights that are pointers or cut short are named before anything is made with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinylmm.config.weight_files import check_weights
from tinylmm.errors import DataError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 548105171\n"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(100), "b": torch.ones(3, 5)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path / "model.safetensors"


def test_whole_files_pass(weights: Path) -> None:
    check_weights(weights.parent)
    save_file({}, weights)
    check_weights(weights.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_pointer_is_named_with_how_to_fetch_the_file(weights: Path, name: str) -> None:
    (weights.parent / name).write_text(POINTER)
    with pytest.raises(DataError, match=rf"{name} is a pointer of git-lfs.*git lfs pull"):
        check_weights(weights.parent)


@pytest.mark.parametrize("kept", [0, 4, 8, 50, -1])
def test_a_file_that_was_cut_short_is_named(weights: Path, kept: int) -> None:
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"model\.safetensors is not a whole file of weights: .*Fetch it again"):
        check_weights(weights.parent)


@pytest.mark.parametrize("content", [b"x" * 100, (10).to_bytes(8, "little") + b"[1, 2, 3] " + b"x" * 9])
def test_another_file_under_the_name_is_no_file_of_weights(weights: Path, content: bytes) -> None:
    weights.write_bytes(content)
    with pytest.raises(DataError, match="is not a whole file of weights"):
        check_weights(weights.parent)
