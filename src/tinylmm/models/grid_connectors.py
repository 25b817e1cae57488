"""Connectors that fold neighbouring patches into fewer tokens: the tower's P tokens must be a square grid."""

from __future__ import annotations

from math import isqrt

from torch import Tensor, nn
from torch.nn import functional

from tinylmm.models.connectors import Connector, mlp


class _GridConnector(Connector):
    """Base: knows the side of the patch grid and refuses tokens that are none."""

    def side(self, tower_tokens: int) -> int:
        """Side of the square grid that `tower_tokens` patches form.

        Raises:
            ValueError: they form none.
        """
        side = isqrt(tower_tokens)
        if side * side != tower_tokens or side == 0:
            raise ValueError(
                f"{type(self).__name__} folds a square grid of patches, but the tower gives {tower_tokens} tokens an "
                "image, which is no square. Set vision_tower.select=patch and vision_tower.drop_first_token=false, and "
                "take a tower with one encoder; or choose connector=mlp or resampler, which take any number"
            )
        return side

    def grid(self, features: Tensor) -> Tensor:
        """(B, P, D) to (B, D, side, side)."""
        side = self.side(features.shape[1])
        return features.transpose(1, 2).unflatten(2, (side, side))


class _PooledConnector(_GridConnector):
    """Base: averages the grid down to fewer tokens before or after its linear layers.

    Args:
        factor: by how much each edge shrinks, rounded up.
        side: edge of the pooled grid in tokens, whatever the tower's; in place of `factor`.
    """

    def __init__(self, vision_dim: int, llm_dim: int, factor: int, side: int | None, init: str) -> None:
        for name, value in (("factor", factor), ("side", side)):
            if value is not None and value < 1:
                raise ValueError(f"connector.options.{name} is {value}; it must be at least 1")
        super().__init__(vision_dim, llm_dim, init)
        self.factor = factor
        self.fixed_side = side

    def pooled_side(self, tower_tokens: int) -> int:
        """Edge of the pooled grid.

        Raises:
            ValueError: the tower's tokens are no square, or fewer than a fixed `side` asks for.
        """
        side = self.side(tower_tokens)
        if self.fixed_side is None:
            return -(-side // self.factor)
        if self.fixed_side > side:
            raise ValueError(
                f"connector.options.side is {self.fixed_side}, more than the {side} x {side} patches of the tower; "
                f"set at most {side}"
            )
        return self.fixed_side

    def num_tokens(self, tower_tokens: int) -> int:
        """Q, the pooled grid's tokens."""
        return self.pooled_side(tower_tokens) ** 2

    def pool(self, features: Tensor) -> Tensor:
        """(B, P, D) to (B, D, pooled side, pooled side), each the mean of the patches it covers."""
        return functional.adaptive_avg_pool2d(self.grid(features), self.pooled_side(features.shape[1]))


class PixelShuffleMLPConnector(_GridConnector):
    """factor x factor patches become one token of factor² x Dv, then norm and MLP (InternVL 1.5, arXiv 2404.16821, 3.1).

    Channels are ordered as in transformers' InternVL.

    Args:
        factor: patches folded along each edge; must divide the grid's side.
        depth: linear layers behind the norm.
        norm: whether a layer norm over the folded channels comes first.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        factor: int = 2,
        depth: int = 2,
        norm: bool = True,
        init: str = "normal",
    ) -> None:
        if factor < 1:
            raise ValueError(f"connector.options.factor is {factor}; it must be at least 1")
        super().__init__(vision_dim, llm_dim, init)
        self.factor = factor
        width = vision_dim * factor * factor
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.layers = mlp(width, llm_dim, depth)
        self.reset_parameters()

    def num_tokens(self, tower_tokens: int) -> int:
        """Q = P / factor²."""
        side = self.side(tower_tokens)
        if side % self.factor:
            fitting = [number for number in range(1, side + 1) if side % number == 0]
            raise ValueError(
                f"connector.options.factor is {self.factor}, which does not divide the tower's grid of {side} x {side} "
                f"patches; factors that do: {', '.join(map(str, fitting))}"
            )
        return tower_tokens // self.factor**2

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P / factor², Dl)."""
        self.num_tokens(features.shape[1])
        grid = self.grid(features)
        factor = self.factor
        tiles = grid.unflatten(3, (-1, factor)).unflatten(2, (-1, factor))  # (B, D, rows, factor, columns, factor)
        folded = tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        return self.layers(self.norm(folded))


class AveragePoolMLPConnector(_PooledConnector):
    """Adaptive average pooling of the patch grid, then an MLP (DeCo, arXiv 2405.20985: 24 x 24 patches to 12 x 12).

    Args:
        factor: by how much each edge shrinks, rounded up: 2 makes 24 patches 12, and 27 patches 14.
        side: edge of the pooled grid, whatever the tower's; in place of `factor`.
        depth, activation: of the MLP.
    """

    def __init__(
        self,
        vision_dim: int,
        llm_dim: int,
        factor: int = 2,
        side: int | None = None,
        depth: int = 2,
        activation: str = "gelu",
        init: str = "normal",
    ) -> None:
        super().__init__(vision_dim, llm_dim, factor, side, init)
        self.layers = mlp(vision_dim, llm_dim, depth, activation)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, Q, Dl)."""
        return self.layers(self.pool(features).flatten(2).transpose(1, 2))


class LDPConnector(_GridConnector):
    """MobileVLM's lightweight downsample projector (arXiv 2312.16886, section 3.4): a quarter of the tokens.

    Two linear layers, then two depthwise-separable blocks of MobileNet-V3's kind with layer norms over channels; the
    first keeps the grid and has a residual, the second has stride 2. An odd side is rounded up: 27 gives 14.
    """

    def __init__(self, vision_dim: int, llm_dim: int, init: str = "torch") -> None:
        super().__init__(vision_dim, llm_dim, init)
        self.mlp = mlp(vision_dim, llm_dim)
        self.blocks = nn.Sequential(_SeparableBlock(llm_dim, stride=1), _SeparableBlock(llm_dim, stride=2))
        self.reset_parameters()

    def num_tokens(self, tower_tokens: int) -> int:
        """Q = ceil(side / 2)²."""
        return ((self.side(tower_tokens) + 1) // 2) ** 2

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, ceil(side / 2)², Dl)."""
        return self.blocks(self.grid(self.mlp(features))).flatten(2).transpose(1, 2)


class LDPv2Connector(_PooledConnector):
    """MobileVLM V2's projector (arXiv 2402.03766, section 3.3): two linear layers, average pooling, a depthwise convolution.

    Args:
        factor: by how much each edge shrinks, rounded up: 2 makes 24 patches 12, as there.
        side: edge of the pooled grid, whatever the tower's; in place of `factor`.
    """

    def __init__(
        self, vision_dim: int, llm_dim: int, factor: int = 2, side: int | None = None, init: str = "torch"
    ) -> None:
        super().__init__(vision_dim, llm_dim, factor, side, init)
        self.mlp = mlp(vision_dim, llm_dim)
        self.position = nn.Conv2d(llm_dim, llm_dim, kernel_size=3, padding=1, groups=llm_dim)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, Q, Dl)."""
        pooled = self.pool(self.mlp(features))
        return (self.position(pooled) + pooled).flatten(2).transpose(1, 2)


class _SeparableBlock(nn.Module):
    """Depthwise 3 x 3, norm, hard-swish, squeeze-and-excite, pointwise, norm; a residual where the grid keeps its size."""

    def __init__(self, dim: int, stride: int) -> None:
        super().__init__()
        self.residual = stride == 1
        self.depthwise = nn.Conv2d(dim, dim, 3, stride, padding=1, groups=dim, bias=False)
        self.depthwise_norm = _ChannelNorm(dim)
        squeezed = _multiple_of_eight(dim / 4)
        self.squeeze = nn.Conv2d(dim, squeezed, 1)
        self.excite = nn.Conv2d(squeezed, dim, 1)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.pointwise_norm = _ChannelNorm(dim)

    def forward(self, grid: Tensor) -> Tensor:
        """(B, D, S, S) to (B, D, S / stride, S / stride)."""
        hidden = functional.hardswish(self.depthwise_norm(self.depthwise(grid)))
        squeezed = functional.relu(self.squeeze(functional.adaptive_avg_pool2d(hidden, 1)))
        hidden = hidden * functional.hardsigmoid(self.excite(squeezed))
        hidden = self.pointwise_norm(self.pointwise(hidden))
        return grid + hidden if self.residual else hidden


class _ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (B, D, H, W)."""

    def forward(self, grid: Tensor) -> Tensor:
        """(B, D, H, W) to (B, D, H, W)."""
        return super().forward(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _multiple_of_eight(value: float) -> int:
    """Round to a multiple of 8, at least 8 and never below nine tenths of `value`, as MobileNet-V3 does its channels."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded
