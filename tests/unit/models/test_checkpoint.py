"""A saved model is one self-contained folder and comes back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.builders import tiny_loaded
from tinylmm.errors import IntegrityError
from tinylmm.models.checkpoint import load_model, save_model


def test_save_and_load_gives_equal_parameters_and_description(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    save_model(loaded, tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", [])
    before, after = loaded.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.description == loaded.description and again.model.template == "llama"
    assert again.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()


def test_blocks_that_are_not_run_survive_a_round_trip(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    save_model(loaded, tmp_path / "model", None, {})
    again = load_model(tmp_path / "model", [])
    before, after = loaded.model.vision_tower.whole_encoder_state(), again.model.vision_tower.whole_encoder_state()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_an_unchanged_part_is_linked_not_copied(tmp_path: Path) -> None:
    save_model(tiny_loaded(), tmp_path / "first", None, {})
    loaded = load_model(tmp_path / "first", [])
    save_model(loaded, tmp_path / "second", None, {"llm": tmp_path / "first" / "llm"})
    assert (tmp_path / "second/llm/model.safetensors").samefile(tmp_path / "first/llm/model.safetensors")
    assert not (tmp_path / "second/vision_tower/model.safetensors").samefile(
        tmp_path / "first/vision_tower/model.safetensors"
    )


def test_a_gathered_state_wins_over_the_models_own(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in loaded.model.state_dict().items()}
    save_model(loaded, tmp_path / "model", state, {})
    again = load_model(tmp_path / "model", [])
    assert all((p == 0.5).all() for p in again.model.parameters())


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(tiny_loaded(), tmp_path / name, None, {})
    for path in (p for p in (tmp_path / "a").rglob("*") if p.is_file()):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes(), path


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=r"config\.json is missing"):
        load_model(tmp_path, [])


@pytest.mark.parametrize("tied", [False, True])
def test_an_llm_without_weights_has_shapes_and_what_is_computed_and_no_memory(tmp_path: Path, tied: bool) -> None:
    loaded = tiny_loaded()
    if tied:
        loaded.model.llm.config.tie_word_embeddings = True
        loaded.model.llm.tie_weights()
    save_model(loaded, tmp_path / "model", None, {})
    whole, shapes = (
        load_model(tmp_path / "model", []).model,
        load_model(tmp_path / "model", [], llm_weights=False).model,
    )
    assert [name for name, _ in shapes.named_parameters()] == [name for name, _ in whole.named_parameters()]
    assert all(parameter.is_meta for parameter in shapes.llm.parameters())
    assert not any(p.is_meta for part in (shapes.vision_tower, shapes.connector) for p in part.parameters())
    for (name, one), other in zip(shapes.named_parameters(), whole.parameters(), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), name
    for (name, one), other in zip(shapes.named_buffers(), whole.buffers(), strict=True):
        assert torch.equal(one, other), name
