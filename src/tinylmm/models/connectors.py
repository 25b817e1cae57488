"""Connectors: tower features (B, P, Dv) in, LLM input embeddings (B, Q, Dl) out."""

from __future__ import annotations

from torch import Tensor, nn

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
INIT_STD = 0.02


class Connector(nn.Module):
    """Base of all connectors.

    Linear weights start from N(0, 0.02) with zero bias, as TinyLLaVA Factory's do through transformers' `_init_weights`.

    Args:
        vision_dim: Dv, width of the tower's features.
        llm_dim: Dl, width of the LLM's input embeddings.
    """

    def __init__(self, vision_dim: int, llm_dim: int) -> None:
        super().__init__()
        self.vision_dim = vision_dim
        self.llm_dim = llm_dim

    def reset_parameters(self) -> None:
        """Draw every linear layer anew from N(0, 0.02)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def num_tokens(self, tower_tokens: int) -> int:
        """Q for P tower tokens; the same number unless the connector resamples."""
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

    def __init__(self, vision_dim: int, llm_dim: int) -> None:
        super().__init__(vision_dim, llm_dim)
        self.linear = nn.Linear(vision_dim, llm_dim)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P, Dl)."""
        return self.linear(features)


class MLPConnector(Connector):
    """Linear(Dv, Dl), then depth-1 times activation and Linear(Dl, Dl) (LLaVA-1.5, arXiv 2310.03744: `mlp2x_gelu`)."""

    def __init__(self, vision_dim: int, llm_dim: int, depth: int = 2, activation: str = "gelu") -> None:
        if depth < 1:
            raise ValueError(f"connector.options.depth is {depth}; an MLP needs at least 1 layer")
        if activation not in ACTIVATIONS:
            raise ValueError(f"connector.options.activation is '{activation}'; allowed: {', '.join(ACTIVATIONS)}")
        super().__init__(vision_dim, llm_dim)
        layers: list[nn.Module] = [nn.Linear(vision_dim, llm_dim)]
        for _ in range(depth - 1):
            layers += [ACTIVATIONS[activation](), nn.Linear(llm_dim, llm_dim)]
        self.layers = nn.Sequential(*layers)
        self.reset_parameters()

    def forward(self, features: Tensor) -> Tensor:
        """(B, P, Dv) to (B, P, Dl)."""
        return self.layers(features)
