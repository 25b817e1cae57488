"""Towers: the tapped layer equals transformers' hidden state, token counts, whole checkpoints."""

from __future__ import annotations

import pytest
import torch

from tests.builders import IMAGE_SIZE, tiny_tower

PIXELS = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("layer", [-1, -2, -3, 0, 2])
def test_features_equal_the_hidden_state_of_the_whole_encoder(kind: str, layer: int) -> None:
    torch.manual_seed(0)
    tower = tiny_tower(kind, layer, "all").eval()
    whole = type(tower.encoder)(tower.config).eval()
    whole.load_state_dict(tower.whole_encoder_state())
    expected = whole(PIXELS, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(tower(PIXELS), expected)


@pytest.mark.parametrize(
    ("kind", "select", "drop", "tokens"),
    [
        ("clip", "patch", False, 4),
        ("clip", "all", False, 5),
        ("siglip", "patch", False, 4),
        ("siglip", "patch", True, 3),
    ],
)
def test_token_count_matches_what_comes_out(kind: str, select: str, drop: bool, tokens: int) -> None:
    tower = tiny_tower(kind, -2, select, drop)
    assert tower.num_tokens == tokens
    assert tower(PIXELS).shape == (2, tokens, tower.hidden_size)


def test_blocks_behind_the_tap_are_not_parameters_but_are_saved() -> None:
    tower = tiny_tower("siglip", -2)
    assert not any("layers.2." in name for name, _ in tower.named_parameters())
    assert any("layers.2." in name for name in tower.whole_encoder_state())


def test_a_layer_outside_the_depth_is_refused_with_the_range() -> None:
    with pytest.raises(ValueError, match="select_layer 7 lies outside the tower's hidden states 0 to 3"):
        tiny_tower("siglip", 7)
