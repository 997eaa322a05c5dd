"""Exponential moving average of a module's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class MovingAverage:
    """Keeps a copy of a module that follows it slowly.

    The decay rises to its final value as ``(1 + n) / (10 + n)`` over the first updates, so that short runs do not
    remember their start.

    Args:
        module: The module that is trained.
        decay: Final decay; 0 makes the copy equal to the module.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards the module's current weights; buffers are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.decay else 0.0
        self.updates += 1
        torch._foreach_lerp_(list(self.module.parameters()), list(module.parameters()), 1 - decay)
        for mine, theirs in zip(self.module.buffers(), module.buffers(), strict=True):
            mine.copy_(theirs)
