"""Weights that come from outside the store lie in it once, however many trainings leave them as they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.builders import tiny_loaded
from tinylmm.config.recipe import TuneSpec
from tinylmm.errors import IntegrityError
from tinylmm.models.checkpoint import LoadedModel
from tinylmm.store.gc import collect_garbage, list_stored
from tinylmm.store.layout import StoreLayout
from tinylmm.training.frozen import cast_frozen, frozen_in_trained_parts, kept_parts

FROZEN = TuneSpec.model_validate({"llm": "frozen", "vision_tower": "frozen", "connector": "full"})


def kept(loaded: LoadedModel, root: Path, stage: str) -> dict[str, Path]:
    return kept_parts(loaded, FROZEN, {}, root / "work" / stage, StoreLayout(root))


def test_a_second_training_links_what_the_first_one_wrote(tmp_path: Path) -> None:
    first, second = (kept(tiny_loaded(), tmp_path, stage) for stage in ("train-1", "train-2"))
    assert first.keys() == second.keys() == {"llm", "vision_tower"}
    for part, folder in first.items():
        names = sorted(path.name for path in folder.iterdir())
        assert names == sorted(path.name for path in second[part].iterdir())
        assert "manifest.json" not in names
        assert all((folder / name).samefile(second[part] / name) for name in names)
    assert len(list((tmp_path / "published").iterdir())) == 2


def test_other_weights_of_the_same_shape_are_written(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    kept(loaded, tmp_path, "train-1")
    with torch.no_grad():
        loaded.model.llm.get_input_embeddings().weight[0, 0] += 1  # type: ignore[operator]
    kept(loaded, tmp_path, "train-2")
    assert len(list((tmp_path / "published").iterdir())) == 3


def test_damaged_weights_are_not_trained_on(tmp_path: Path) -> None:
    folders = kept(tiny_loaded(), tmp_path, "train-1")
    path = folders["llm"] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # the same file as in published/
    with pytest.raises(IntegrityError, match=r"published/.* cannot be used; move it away"):
        kept(tiny_loaded(), tmp_path, "train-2")


def test_gc_deletes_what_no_model_links_to(tmp_path: Path) -> None:
    kept(tiny_loaded(), tmp_path, "train-1")
    rows = {row.name: (row.kind, row.status) for row in list_stored(tmp_path)}
    assert rows == dict.fromkeys(("llm weights", "vision_tower weights"), ("published", "complete"))
    assert [row.folder for row in collect_garbage(tmp_path, set())] == ["work/train-1"]
    collect_garbage(tmp_path, set(), dry_run=False)
    assert len(collect_garbage(tmp_path, set(), dry_run=False)) == 2
    assert list_stored(tmp_path) == []
    assert os.listdir(tmp_path / "published") == []  # noqa: PTH208


def test_only_parts_whose_files_are_kept_are_rounded_in_memory(tmp_path: Path) -> None:
    model = tiny_loaded().model
    model.requires_grad_(False)
    model.llm.get_input_embeddings().requires_grad_(True)  # type: ignore[operator]
    frozen = frozen_in_trained_parts(model, {"vision_tower": tmp_path, "connector": tmp_path})
    assert frozen and all(name.startswith("llm.") for name in frozen)
    cast_frozen(model, {"vision_tower": tmp_path, "connector": tmp_path}, "bf16", torch.device("meta"))
    types = {name.partition(".")[0]: parameter.dtype for name, parameter in model.named_parameters()}
    assert types == {"llm": torch.float32, "vision_tower": torch.bfloat16, "connector": torch.bfloat16}
