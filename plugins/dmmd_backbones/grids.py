"""Tokens on a grid: pixels of several channels, or codes of one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dmmd_core import FieldError


def image_axes(grid: Sequence[int] | None) -> tuple[int, int, int]:
    """Height, width and channels of a grid ``(height, width)`` or ``(height, width, channels)``.

    Raises:
        FieldError: The data's grid has another number of axes.
    """
    if grid is None or len(grid) not in (2, 3):
        raise FieldError("", f"works on grids of height, width and perhaps channels, got grid {grid}")
    height, width, channels = (*grid, 1)[:3]
    return height, width, channels


class ChannelEmbedding(nn.Module):
    """Embeds tokens in the order row, column, channel, each channel with a table of its own.

    Args:
        num_inputs: Number of input ids.
        channels: Channels per place of the grid.
        width: Width of the result.
    """

    def __init__(self, num_inputs: int, channels: int, width: int) -> None:
        super().__init__()
        self.channels, self.num_inputs = channels, num_inputs
        self.table = nn.Embedding(channels * num_inputs, width)

    def forward(self, z: Tensor) -> Tensor:
        """Map input ids, int64 ``[batch, length]``, to ``[batch, length, width]``."""
        if self.channels > 1:
            z = z + self.num_inputs * (torch.arange(z.shape[1], device=z.device) % self.channels)
        return self.table(z)


class GridPositions(nn.Module):
    """Learned positions: the sum of one vector per axis.

    Args:
        axes: Extents of the axes.
        width: Width of the result.
    """

    def __init__(self, axes: Sequence[int], width: int) -> None:
        super().__init__()
        scale = 1 / math.sqrt(len(axes))
        self.axes = nn.ParameterList(nn.Parameter(scale * torch.randn(extent, width)) for extent in axes)

    def forward(self) -> Tensor:
        """Return ``[*axes, width]``."""
        total = self.axes[0]
        for axis in list(self.axes)[1:]:
            total = total.unsqueeze(-2) + axis
        return total
