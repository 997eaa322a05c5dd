"""Rotary positions over a line or a grid (Su et al., arXiv:2104.09864)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rotary_angles(grid: Sequence[int], head_width: int, base: float = 10_000.0) -> Tensor:
    """Angles of rotary positions over a grid of any number of axes (Su et al., arXiv:2104.09864).

    Each axis gets an equal share of the head's pairs.

    Args:
        grid: Extent of every axis; their product is the length.
        head_width: Width of a head, divisible by twice the number of axes.
        base: Longest period, in positions.

    Returns:
        ``[length, head_width / 2]`` in radians.
    """
    pairs = head_width // 2 // len(grid)
    frequencies = base ** (-torch.arange(pairs) / pairs)
    positions = torch.cartesian_prod(*[torch.arange(extent) for extent in grid]).reshape(-1, len(grid))
    return (positions.unsqueeze(-1) * frequencies).flatten(1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs of channels of ``[batch, length, heads, head_width]`` by angles ``[length, head_width / 2]``."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1).to(x.dtype), sine.unsqueeze(1).to(x.dtype)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
