"""Contrastive pretraining of a vision tower with the sigmoid loss of SigLIP (arXiv 2303.15343).

The tower learns to give an image the same direction as its caption has in a small text transformer, which is thrown
away afterwards. The captions have a word-level vocabulary of their own, so that the tower owes nothing to any LLM.

Shapes: B images or captions, S words, D width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinylmm.config.spec import TextTowerSpec

PAD, UNKNOWN = 0, 1
_WORD = re.compile(r"\w+|[^\w\s]")


def sigmoid_loss(image: Tensor, text: Tensor, log_scale: Tensor, bias: Tensor, same: Tensor | None = None) -> Tensor:
    """Return the loss of equation 1: every image against every caption, each pair a binary decision.

    Args:
        image: (B, D) embeddings, unit length.
        text: (B, D) embeddings, unit length.
        log_scale: scalar, logarithm of the temperature t'.
        bias: scalar b.
        same: (B, B) bool, true where caption j fits image i as well; the diagonal alone by default. In a small world
            captions recur, and counting a true pair as a false one would teach the tower to tell equal scenes apart.
    """
    logits = image @ text.T * log_scale.exp() + bias
    positive = torch.eye(len(image), dtype=torch.bool, device=image.device) if same is None else same
    sign = positive.to(logits.dtype) * 2 - 1
    return -F.logsigmoid(sign * logits).sum() / len(image)


class Vocabulary:
    """Words of a set of captions, numbered in alphabetical order after padding (0) and unknown (1)."""

    def __init__(self, captions: Sequence[str]) -> None:
        self._words = {
            word: index for index, word in enumerate(sorted({w for c in captions for w in _WORD.findall(c)}), 2)
        }

    def __len__(self) -> int:
        return len(self._words) + 2

    def encode(self, captions: Sequence[str], length: int | None = None) -> Tensor:
        """Return word numbers (B, S) int64, padded on the right; S is `length` or that of the longest caption."""
        rows = [[self._words.get(word, UNKNOWN) for word in _WORD.findall(caption)][:length] for caption in captions]
        width = length or max(map(len, rows))
        return torch.tensor([row + [PAD] * (width - len(row)) for row in rows])


class TextEncoder(nn.Module):
    """A pre-norm transformer over words, averaged over the words that are there."""

    def __init__(self, vocabulary: int, max_words: int, width: int = 64, layers: int = 2, heads: int = 4) -> None:
        """Build the encoder.

        Args:
            vocabulary: number of word numbers, padding included.
            max_words: longest caption; longer ones are the caller's to cut.
            width: D of the token stream.
            layers: number of blocks.
            heads: attention heads; divides `width`.
        """
        super().__init__()
        self.words = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.positions = nn.Parameter(torch.randn(max_words, width) * 0.02)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, words: Tensor) -> Tensor:
        """(B, S) word numbers -> (B, D)."""
        padding = words == PAD
        hidden = self.words(words) + self.positions[: words.shape[1]]
        hidden = self.norm(self.blocks(hidden, src_key_padding_mask=padding))
        kept = (~padding).unsqueeze(-1).to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)


class ContrastivePair(nn.Module):
    """An image encoder with a pooling head and a text encoder, under one sigmoid loss."""

    def __init__(
        self, tower: nn.Module, tower_width: int, vocabulary: int, max_words: int, text_tower: TextTowerSpec
    ) -> None:
        """Wrap `tower` (called with `pixel_values=`, gives `pooler_output` (B, tower_width)).

        Args:
            tower: the encoder to pretrain.
            tower_width: width of its pooled output.
            vocabulary: size of the captions' vocabulary.
            max_words: longest caption.
            text_tower: size of the text encoder, where it is not the usual one.
        """
        super().__init__()
        self.tower = tower
        self.text = TextEncoder(vocabulary, max_words=max_words, **text_tower.given())
        self.project = nn.Linear(self.text.norm.normalized_shape[0], tower_width)
        # Initial values of SigLIP, section 3.2: t = 10 and b = -10 start near the prior that most pairs do not match.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """Return the loss of (B, 3, H, W) images and their captions (B, S)."""
        image = F.normalize(self.tower(pixel_values=pixels).pooler_output, dim=-1)
        text = F.normalize(self.project(self.text(words)), dim=-1)
        same = (words.unsqueeze(1) == words.unsqueeze(0)).all(-1)
        return sigmoid_loss(image, text, self.log_scale, self.bias, same)
