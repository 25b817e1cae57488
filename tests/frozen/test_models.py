"""Saved models stay loadable and are saved as before: files, configs, names of tensors, dotted paths of classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.frozen import product
from tests.frozen.record import FILL, frozen, small_model, targets, tiny_model, write_small_model
from tests.frozen.small_models import SMALL_MODELS

TARGETS = [(role, path) for role, paths in frozen("targets").items() for path in paths]


@pytest.mark.parametrize(("role", "path"), TARGETS)
def test_every_dotted_path_that_specs_and_models_name_is_still_a_part(role: str, path: str) -> None:
    assert product.resolve_target(path, (), None, role).__name__ == path.rpartition(".")[2]


def test_the_shipped_files_name_those_paths() -> None:
    named = targets()
    gone = [path for role, path in TARGETS if path not in named[role]]
    assert gone == []


def test_a_model_is_saved_as_before(tmp_path: Path) -> None:
    assert tiny_model(tmp_path) == frozen("tiny_model")


def test_every_small_model_is_frozen() -> None:
    assert list(frozen("small_models")) == list(SMALL_MODELS)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_small_model_is_described_and_its_tensors_are_named_as_before(name: str, tmp_path: Path) -> None:
    assert small_model(name, tmp_path) == frozen("small_models")[name]


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_model_saved_before_loads_with_every_weight(name: str, tmp_path: Path) -> None:
    write_small_model(name, tmp_path)
    loaded = product.load(tmp_path)
    parameters = dict(loaded.model.named_parameters())
    assert parameters
    others = [key for key, value in parameters.items() if not torch.equal(value, torch.full_like(value, FILL))]
    assert others == [], "weights that are not in the files any more"
    described = frozen("small_models")[name]["configs"]["config.json"]
    assert {key: loaded.description.as_json()[key] for key in described} == described
