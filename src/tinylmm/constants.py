"""Numbers and words that several packages must agree on."""

from __future__ import annotations

IMAGE_SLOT = "<image>"
"""Stands for one image in a text."""
IMAGE_TOKEN_ID = -200
"""Stands for an image in token ids: once an image in prepared data, at every position it takes in what a model reads.
Replaced by image features, never embedded (LLaVA's IMAGE_TOKEN_INDEX)."""
IGNORE_INDEX = -100
"""Label of a position without loss (the default of PyTorch's cross-entropy)."""
MAX_PIXELS = 50_000_000
"""Largest image that is decoded, read from its header: a small file can unpack into all memory."""

Extent = tuple[int, int] | tuple[int, int, int]
"""Width and height of an image in pixels; of a clip also how many frames of it are shown."""
