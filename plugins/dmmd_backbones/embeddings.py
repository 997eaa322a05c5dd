"""Embeddings shared by the backbones of this package."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t in [0, 1] through a two-layer network.

    Args:
        width: Width of the result.
        frequencies: Number of sine and cosine pairs, spaced geometrically from 1 to 1,000 radians.
    """

    def __init__(self, width: int, frequencies: int = 32) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.layers = nn.Sequential(nn.Linear(2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times of any shape ``[...]`` as ``[..., width]``."""
        exponents = torch.arange(self.frequencies, device=t.device) / (self.frequencies - 1)
        angles = t.float().unsqueeze(-1) * torch.exp(math.log(1000.0) * exponents)
        features = torch.cat((angles.sin(), angles.cos()), dim=-1)
        return self.layers(features.to(self.layers[0].weight.dtype))
