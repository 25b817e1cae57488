"""Connectors: tower features (B, P, Dv) in, LLM input embeddings (B, Q, Dl) out.

Here are the ones that keep a token a patch; `query_connectors.py` has those that ask with learned queries,
`video_connectors.py` those of them that take all frames of a clip at once, and `grid_connectors.py` those that fold
neighbouring patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
INITS = ("normal", "torch")
INIT_STD = 0.02


class Connector(nn.Module):
    """Base of all connectors.

    Args:
        vision_dim: Dv, width of the tower's features.
        llm_dim: Dl, width of the LLM's input embeddings.
        init: how linear and convolution weights start. "normal" is N(0, 0.02) with zero bias, as in TinyLLaVA Factory,
            where transformers' `_init_weights` reaches the connector; "torch" is PyTorch's own, as in LLaVA, paper 1's
            TinyLLaVABench and MobileVLM.

    Raises:
        ValueError: an unknown `init`.
    """

    streams = 1
    """Towers whose features lie interleaved in P: 2 for a connector made for a mixture of features."""
    takes_clips = False
    """Whether it takes the tokens of all frames of a clip together, (B, T * P, Dv), as `forward(features, lengths)`; any other
    one is given each frame as an image, and its tokens lie one frame behind the other."""

    def __init__(self, vision_dim: int, llm_dim: int, init: str = "normal") -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"connector.options.init is '{init}'; allowed: {', '.join(INITS)}")
        self.vision_dim = vision_dim
        self.llm_dim = llm_dim
        self.init = init

    def reset_parameters(self) -> None:
        """Draw every linear and convolution layer anew, as `init` says; other parameters keep what they have."""
        for module in self.modules():
            if not isinstance(module, nn.Linear | nn.Conv2d):
                continue
            if self.init == "torch":
                module.reset_parameters()
                continue
            nn.init.normal_(module.weight, std=INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def num_tokens(self, tower_tokens: int) -> int:
        """Q for P tower tokens; the same number unless the connector resamples.

        Raises:
            ValueError: the connector cannot take P tokens.
        """
        return tower_tokens


class IdentityConnector(Connector):
    """Hands features on unchanged; needs a tower exactly as wide as the LLM."""

    def __init__(self, vision_dim: int, llm_dim: int) -> None:
        if vision_dim != llm_dim:
            raise ValueError(
                f"connector=identity needs equal widths, but the tower's is {vision_dim} and the LLM's {llm_dim}"
            )
        super().__init__(vision_dim, llm_dim)

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, D) to (B, P, D)."""
        return features


class LinearConnector(Connector):
    """One linear layer with bias (LLaVA, arXiv 2304.08485, section 4.1)."""

    def __init__(self, vision_dim: int, llm_dim: int, init: str = "normal") -> None:
        super().__init__(vision_dim, llm_dim, init)
        self.linear = nn.Linear(vision_dim, llm_dim)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P, Dl)."""
        return self.linear(features)


def mlp(input_dim: int, output_dim: int, depth: int = 2, activation: str = "gelu") -> nn.Sequential:
    """Return Linear(input, output), then depth-1 times activation and Linear(output, output).

    Raises:
        ValueError: a depth below 1 or an unknown activation.
    """
    if depth < 1:
        raise ValueError(f"connector.options.depth is {depth}; an MLP needs at least 1 layer")
    if activation not in ACTIVATIONS:
        raise ValueError(f"connector.options.activation is '{activation}'; allowed: {', '.join(ACTIVATIONS)}")
    layers: list[nn.Module] = [nn.Linear(input_dim, output_dim)]
    for _ in range(depth - 1):
        layers += [ACTIVATIONS[activation](), nn.Linear(output_dim, output_dim)]
    return nn.Sequential(*layers)


class MLPConnector(Connector):
    """Linear(Dv, Dl), then depth-1 times activation and Linear(Dl, Dl) (LLaVA-1.5, arXiv 2310.03744: `mlp2x_gelu`)."""

    def __init__(
        self, vision_dim: int, llm_dim: int, depth: int = 2, activation: str = "gelu", init: str = "normal"
    ) -> None:
        super().__init__(vision_dim, llm_dim, init)
        self.layers = mlp(vision_dim, llm_dim, depth, activation)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P, Dl)."""
        return self.layers(features)


class MoFMLPConnector(Connector):
    """An MLP each for the two encoders of a MoF tower (TinyLLaVA Factory `connector/mof_mlp.py`; arXiv 2401.06209).

    The tower's tokens are interleaved already, even ones CLIP's and odd ones DINOv2's, and stay so.
    """

    streams = 2

    def __init__(
        self, vision_dim: int, llm_dim: int, depth: int = 2, activation: str = "gelu", init: str = "normal"
    ) -> None:
        super().__init__(vision_dim, llm_dim, init)
        self.clip = mlp(vision_dim, llm_dim, depth, activation)
        self.dinov2 = mlp(vision_dim, llm_dim, depth, activation)
        self.reset_parameters()

    def num_tokens(self, tower_tokens: int) -> int:
        """Q = P, which must be even."""
        if tower_tokens % 2:
            raise ValueError(f"connector=mof_mlp takes pairs of tokens, but the tower gives {tower_tokens} an image")
        return tower_tokens

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P, Dl)."""
        pairs = torch.stack([self.clip(features[:, 0::2]), self.dinov2(features[:, 1::2])], dim=2)
        return pairs.flatten(1, 2)
