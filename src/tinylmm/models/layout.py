"""Where in a batch's rows samples begin, images lie and tokens are learnt: found once, before the batch goes to a device.

A GPU that is asked for it stops the process until all that was queued is done; on the CPU side of a batch it costs nothing.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from tinylmm.constants import IGNORE_INDEX, IMAGE_TOKEN_ID


class Layout(TypedDict):
    """Places in rows (R, L) laid end to end, N = R * L positions."""

    supervised: Tensor
    """(S,) int64, positions at which a token is learnt."""
    images: Tensor
    """(I,) int64, positions that image features take."""
    bounds: Tensor
    """(samples + 1,) int32, where samples begin, and N."""
    longest: int
    """Positions of the longest sample."""


def layout_of(input_ids: Tensor, position_ids: Tensor, targets: Tensor) -> Layout:
    """Find the places of rows (R, L), each tensor int64."""
    bounds = sample_bounds(position_ids)
    return Layout(
        supervised=(targets.flatten() != IGNORE_INDEX).nonzero().flatten(),
        images=(input_ids.flatten() == IMAGE_TOKEN_ID).nonzero().flatten(),
        bounds=bounds,
        longest=int(bounds.diff().max()),
    )


def sample_bounds(position_ids: Tensor) -> Tensor:
    """Where samples begin in rows (R, L) laid end to end, and R * L: (samples + 1,) int32.

    One begins with each row and wherever positions do not count on by one, and so does the padding at a row's end.
    """
    begins = torch.ones_like(position_ids, dtype=torch.bool)
    begins[:, 1:] = position_ids.diff(dim=-1) != 1
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=position_ids.numel()).to(torch.int32)
