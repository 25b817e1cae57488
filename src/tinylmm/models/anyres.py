"""LLaVA-1.6's `anyres` on the model's side: tokens of an image's tiles put together, its margins cut, newlines set.

Shapes: N images with T tiles in all, P tower tokens a tile, side x side connector tokens a tile, Dv and Dl as in `lmm.py`.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from tinylmm.config.spec import ImageSpec
from tinylmm.errors import ConfigError, Fault
from tinylmm.models.connectors import Connector
from tinylmm.sizing.tiling import Tiling


class TiledConnector(Connector):
    """A connector for images in tiles: what `inner` makes of every tile, laid out as the image is.

    The newline at the end of each row of tokens is learned, and starts from N(0, 1 / Dl) as transformers' LlavaNext does.

    Args:
        inner: maps a tile's tokens; what it gives must be a square grid.
        tiling: how images were cut.
        tower_tokens: P.

    Raises:
        ValueError: `inner` gives no square grid.
    """

    def __init__(self, inner: Connector, tiling: Tiling, tower_tokens: int) -> None:
        super().__init__(inner.vision_dim, inner.llm_dim)
        tokens = inner.num_tokens(tower_tokens)
        self.side = isqrt(tokens)
        if self.side**2 != tokens or inner.streams > 1:
            raise ValueError(
                f"anyres lays the tokens of its tiles out on a grid, but {type(inner).__name__} gives {tokens} a tile, "
                "which form none. Choose connector=mlp with vision_tower.select=patch and drop_first_token=false, "
                "or image.mode=square"
            )
        self.inner = inner
        self.tiling = tiling
        self.image_newline = nn.Parameter(torch.randn(inner.llm_dim) / inner.llm_dim**0.5)

    def num_tokens(self, tower_tokens: int) -> int:
        """Tokens of an image of one tile: its own and a newline."""
        return self.inner.num_tokens(tower_tokens) + 1

    def tokens_of(self, width: int, height: int) -> int:
        """Tokens of an image of this size in pixels."""
        return self.tiling.num_tokens(width, height, self.side)

    def forward(self, features: Tensor, sizes: Tensor | None = None, frames: Tensor | None = None) -> Tensor:
        """Tiles of several images, (T, P, Dv), to the images' tokens one behind the other, (sum of `tokens_of`, Dl).

        Args:
            features: the tower's, of each image the whole view and then its tiles, row by row; of a clip its frames, whole.
            frames: (N,) int64, how many frames each clip has, 0 for an image; without them all are images.
            sizes: (N, 2) int64, width and height of each image in pixels. Without them the features are those of images of
                one tile, (N, P, Dv), and give (N, side² + 1, Dl), each with its newline.

        Raises:
            ValueError: the images have another number of tiles.
        """
        if sizes is None:
            tokens = self.inner(features)
            return torch.cat([tokens, self.image_newline.to(tokens.dtype).expand(len(tokens), 1, -1)], dim=1)
        shapes = [(int(width), int(height)) for width, height in sizes.tolist()]
        clips = [0] * len(shapes) if frames is None else frames.tolist()
        counts = [clip or self.tiling.num_tiles(*shape) for clip, shape in zip(clips, shapes, strict=True)]
        if sum(counts) != len(features):
            raise ValueError(f"{len(shapes)} images of these sizes have {sum(counts)} tiles, but {len(features)} came")
        images = zip(self.inner(features).split(counts), clips, shapes, strict=True)
        return torch.cat([seen.flatten(0, 1) if clip else self._lay_out(seen, *shape) for seen, clip, shape in images])

    def _lay_out(self, tiles: Tensor, width: int, height: int) -> Tensor:
        """One image's tiles (1 + tiles, side², Dl) to (tokens, Dl)."""
        rows, columns = self.tiling.grid(width, height)
        crop = self.tiling.crop(width, height, self.side)
        whole, detail = tiles[0], tiles[1:].unflatten(1, (self.side, self.side)).unflatten(0, (rows, columns))
        canvas = detail.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)  # (rows x side, columns x side, Dl)
        shown = canvas[crop.top : crop.top + crop.rows, crop.left : crop.left + crop.columns]
        newline = self.image_newline.to(tiles.dtype).expand(crop.rows, 1, -1)
        return torch.cat([whole, torch.cat([shown, newline], dim=1).flatten(0, 1)])


def with_tiles(connector: Connector, image: ImageSpec, tower_tokens: int) -> Connector:
    """Return the connector as images of this preprocessing need it: for `anyres`, a `TiledConnector` around it.

    Raises:
        ConfigError: its tokens cannot be laid out on a grid.
    """
    if image.mode != "anyres":
        return connector
    try:
        return TiledConnector(connector, Tiling(image.size, image.tiles), tower_tokens)
    except ValueError as error:
        raise ConfigError([Fault("vision_tower.image.mode", f"{error}.")]) from error


def clip_tokens(connector: Connector, tower_tokens: int, frames: int) -> int:
    """Tokens of a clip: its frames' one behind the other, each whole, or those of all frames together."""
    if isinstance(connector, TiledConnector):
        return frames * connector.side**2
    if connector.takes_clips:
        return connector.num_tokens(frames * tower_tokens)
    return frames * connector.num_tokens(tower_tokens)
