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


class Conditioning(nn.Module):
    """Time and, where a network is told one, class: what adaptive norms listen to.

    Args:
        width: Width of the result.
        num_classes: Number of classes, or None for a network without labels. One more row than classes: the last
            stands for "no label".
    """

    def __init__(self, width: int, num_classes: int | None) -> None:
        super().__init__()
        self.time = TimeEmbedding(width)
        self.classes = None if num_classes is None else nn.Embedding(num_classes + 1, width)

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        """Embed times ``[batch]`` or ``[batch, length]`` and labels ``[batch]`` as ``[batch, 1 or length, width]``."""
        embedded = self.time(t if t.ndim == 2 else t.unsqueeze(1))
        if self.classes is not None:
            if label is None:
                label = torch.full(t.shape[:1], self.classes.num_embeddings - 1, device=t.device)
            embedded = embedded + self.classes(label).unsqueeze(1)
        return nn.functional.silu(embedded)
