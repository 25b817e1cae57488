"""Optimisers beside AdamW that no published recipe was trained with: never a default, and named in plan and report.

`muon`: matrices of hidden layers move along the nearest orthogonal matrix of their momentum (K. Jordan et al., 2024;
`torch.optim.Muon`), all else by AdamW. Its steps are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that a
recipe's learning rates hold; both are known from pretraining, and nobody has published what they give here.

`adamw_bf16`: AdamW whose two moments are kept in bf16, half of the optimiser's memory. What is computed of them is fp32; what
is kept is rounded up or down at random, so that it is right on average. Rounded to the nearest, a second moment would stand
still: its step of a thousandth is less than half of bf16's last place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LOW_BITS = 16
"""Bits of fp32 that bf16 does not have."""


def hidden_matrices(network: nn.Module) -> set[str]:
    """Names of the weights that Muon moves: those of linear layers, but for output heads and what is tied to embeddings."""
    llm: Any = getattr(network, "llm", network)
    apart = {
        id(parameter)
        for module in (llm.get_input_embeddings(), llm.get_output_embeddings())
        if module is not None
        for parameter in module.parameters()
    }
    return {
        f"{name}.weight"
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module.weight.dim() == 2 and id(module.weight) not in apart
    }


class MuonWithAdamW(torch.optim.Optimizer):
    """Torch's Muon for groups that are `hidden`, its AdamW for the others, as one optimiser.

    Args:
        params: groups with `hidden`, `lr` and `weight_decay`.
        lr: of groups without one.
        betas, eps: of AdamW.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        hidden = [dict(group) for group in params if group["hidden"]]
        others = [dict(group) for group in params if not group["hidden"]]
        self._parts: dict[bool, torch.optim.Optimizer] = {}
        if hidden:
            self._parts[True] = torch.optim.Muon(hidden, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        if others:
            self._parts[False] = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step; groups and state are this optimiser's own, which may have been loaded since the last."""
        loss = None if closure is None else closure()
        for kind, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["hidden"] == kind]
            part.state = self.state
            part.step()
        return loss


class NarrowAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with moments in bf16, rounded at random.

    Args:
        params: parameters or groups of them.
        lr, betas, eps, weight_decay: of groups without their own.
        seed: of what is rounded which way, with the step and the place of the parameter: a training that is resumed, and
            every rank, rounds alike.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._seed = seed
        self._draws: dict[torch.device, torch.Generator] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        loss = None if closure is None else closure()
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._move(parameter, group, place)
        return loss

    def _move(self, parameter: Tensor, group: Mapping[str, Any], place: int) -> None:
        state, (one, two) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
        state["step"] += 1
        done = float(state["step"])
        gradient = parameter.grad.float()  # type: ignore[union-attr]
        first = state["exp_avg"].float().lerp_(gradient, 1 - one)
        second = state["exp_avg_sq"].float().mul_(two).addcmul_(gradient, gradient, value=1 - two)
        draw = self._draw(parameter.device, int(done), place)
        state["exp_avg"].copy_(rounded_at_random(first, draw))
        state["exp_avg_sq"].copy_(rounded_at_random(second, draw))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = second.div_(1 - two**done).sqrt_().add_(group["eps"])
        parameter.addcdiv_(first, root, value=-group["lr"] / (1 - one**done))

    def _draw(self, device: torch.device, step: int, place: int) -> torch.Generator:
        draw = self._draws.setdefault(device, torch.Generator(device))
        draw.manual_seed(((self._seed * 1_000_003 + step) * 1_000_003 + place) % 2**63)
        return draw


def rounded_at_random(numbers: Tensor, draw: torch.Generator) -> Tensor:
    """fp32 numbers as bf16: the one above or below, each as likely as the number is near it. Finite ones stay finite."""
    bits = numbers.contiguous().view(torch.int32)
    added = torch.randint(0, 1 << LOW_BITS, bits.shape, generator=draw, device=bits.device, dtype=torch.int32)
    up = (bits + added) & -(1 << LOW_BITS)
    found = up.view(torch.float32)
    return torch.where(torch.isfinite(found), found, numbers).to(torch.bfloat16)
