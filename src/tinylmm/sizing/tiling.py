"""Geometry of LLaVA-1.6's `anyres`: how an image is cut into tiles, and which of their tokens show it. No torch.

An image is seen once whole, squashed to one tile, and once in detail: scaled into the best of a few canvases of tiles,
centred, the rest black. Of the detail, tokens that lie on the black margins are left out, and each row of tokens ends in
a learned newline. Numbers and rounding are those of transformers' LlavaNext (LLaVA-1.6: llava-vl.github.io/blog/2024-01-30).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Grid = tuple[int, int]
"""Rows and columns of tiles."""


@dataclass(frozen=True)
class Crop:
    """Rows and columns of tokens that show the image: `top` and `left` are left out, and as many on the other side."""

    top: int
    left: int
    rows: int
    columns: int


class Tiling:
    """Cuts images of any shape into tiles of one size.

    Args:
        size: edge of a tile in pixels.
        grids: canvases to choose from, as rows and columns of tiles.

    Raises:
        ValueError: no canvas at all, or one without a tile.
    """

    def __init__(self, size: int, grids: Sequence[Sequence[int]]) -> None:
        self.size = size
        self.grids: list[Grid] = [(int(rows), int(columns)) for rows, columns in grids]
        if not self.grids or min(min(grid) for grid in self.grids) < 1:
            raise ValueError(
                f"image.tiles is {list(grids)}; it needs pairs of rows and columns, at least one, each >= 1"
            )

    def grid(self, width: int, height: int) -> Grid:
        """The canvas that shows most pixels of an image (width x height), and of those that show as many the smallest."""
        best: tuple[float, float] | None = None
        chosen = self.grids[0]
        for rows, columns in self.grids:
            canvas_width, canvas_height = columns * self.size, rows * self.size
            scale = min(canvas_width / width, canvas_height / height)
            shown = min(int(width * scale) * int(height * scale), width * height)
            rank = (shown, shown - canvas_width * canvas_height)
            if best is None or rank > best:
                best, chosen = rank, (rows, columns)
        return chosen

    def num_tiles(self, width: int, height: int) -> int:
        """Tiles of an image, the whole view counted in."""
        rows, columns = self.grid(width, height)
        return 1 + rows * columns

    def scaled(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image is resized to lie in its canvas."""
        rows, columns = self.grid(width, height)
        canvas_width, canvas_height = columns * self.size, rows * self.size
        across, down = canvas_width / width, canvas_height / height  # scales first: transformers' own rounding
        if across < down:
            return canvas_width, min(math.ceil(height * across), canvas_height)
        return min(math.ceil(width * down), canvas_width), canvas_height

    def crop(self, width: int, height: int, side: int) -> Crop:
        """Which tokens of the canvas show the image, where a tile has side x side of them."""
        tiles_down, tiles_across = self.grid(width, height)
        rows, columns = tiles_down * side, tiles_across * side
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
            return Crop(top, 0, rows - 2 * top, columns)
        left = (columns - int(round(width * (rows / height), 7))) // 2
        return Crop(0, left, rows, columns - 2 * left)

    def num_tokens(self, width: int, height: int, side: int) -> int:
        """Tokens of an image: the whole view, then the rows that show it, each with its newline."""
        crop = self.crop(width, height, side)
        return side * side + crop.rows * (crop.columns + 1)
