"""The sigmoid loss is equation 1, and the contrastive pair learns to tell images apart by their captions."""

from __future__ import annotations

import math

import pytest
import torch

from tests.builders import IMAGE_SIZE, VISION, tiny_tower
from tinylmm.config.spec import TextTowerSpec
from tinylmm.models.pretraining import PAD, UNKNOWN, ContrastivePair, TextEncoder, Vocabulary, sigmoid_loss


def test_the_loss_is_that_of_equation_1() -> None:
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.6, 0.8], [0.0, 1.0]])
    t, b = 10.0, -4.0
    # Pairs (1,1) and (2,2) match, (1,2) and (2,1) do not; similarities are 0.6, 1 and 0, 0.8.
    terms = [(1, 0.6), (-1, 0.0), (-1, 0.8), (1, 1.0)]
    expected = -sum(math.log(1 / (1 + math.exp(-z * (t * similarity + b)))) for z, similarity in terms) / 2
    loss = sigmoid_loss(image, text, torch.tensor(math.log(t)), torch.tensor(b))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_equal_captions_count_as_matches_of_both_images() -> None:
    torch.manual_seed(0)
    embedding = torch.nn.functional.normalize(torch.randn(2, 4), dim=-1)
    same = torch.ones(2, 2, dtype=torch.bool)
    scale, bias = torch.tensor(1.0), torch.tensor(0.0)
    equal = sigmoid_loss(embedding[:1].expand(2, -1), embedding[:1].expand(2, -1), scale, bias, same)
    assert equal.item() == pytest.approx(2 * math.log(1 + math.exp(-math.e)), rel=1e-5)


def test_a_vocabulary_numbers_words_by_spelling_and_pads_on_the_right() -> None:
    vocabulary = Vocabulary(["a red 3, top left", "a 7"])
    assert len(vocabulary) == 9
    words = vocabulary.encode(["a 7", "a green 7 , top"])
    assert words[0].tolist() == [5, 4, PAD, PAD, PAD]
    assert words[1, 1] == UNKNOWN
    assert vocabulary.encode(["a red 3"], length=2).shape == (1, 2)


def test_padding_does_not_change_a_caption_s_embedding() -> None:
    torch.manual_seed(0)
    encoder = TextEncoder(10, max_words=8, width=16, layers=1, heads=2).eval()
    words = torch.tensor([[3, 4, 5]])
    padded = torch.tensor([[3, 4, 5, PAD, PAD]])
    torch.testing.assert_close(encoder(words), encoder(padded))


def test_the_pair_learns_four_images_by_heart() -> None:
    torch.manual_seed(0)
    tower = tiny_tower(select_layer=-1).encoder
    pair = ContrastivePair(tower, VISION["hidden_size"], 8, 4, TextTowerSpec(width=16, layers=1, heads=2))
    pixels = torch.randn(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    words = torch.tensor([[2, 3], [2, 4], [5, 3], [5, 4]])
    optimizer = torch.optim.AdamW(pair.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = pair(pixels, words)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
