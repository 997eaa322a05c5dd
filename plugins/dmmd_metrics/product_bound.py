"""How near a product distribution can come: the bound for one factorised step without input noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import Draws, EnumerableData, Metric, Requirement, Subject, Value, option
from dmmd_metrics.total_variation import outer, total_variation


def best_product(truth: Tensor, vocab_size: int, length: int, *, starts: int, steps: int, seed: int) -> Tensor:
    """Smallest total variation between a distribution and any product distribution.

    Subgradient descent on the logits of all positions from many starts; the best value over all steps, float64.

    Args:
        truth: Probabilities ``[vocab ** length]``.
        vocab_size: Number of tokens.
        length: Number of positions.
        starts: Random starts.
        steps: Steps of Adam with a falling rate.
        seed: Seed of the starts.

    Returns:
        A scalar: an upper bound of the minimum, tight for the sizes that can be enumerated.
    """
    logits = 2 * Draws.for_range(seed, 0, 0, starts).normal("starts", (length, vocab_size)).double()
    logits.requires_grad_(True)
    best = torch.full((), torch.inf, dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 - step / steps) ** 2
        distances = total_variation(outer(logits.softmax(-1)), truth)
        best = torch.minimum(best, distances.min().detach())
        optimizer.zero_grad()
        distances.sum().backward()
        optimizer.step()
    return best


class ProductBound(Metric):
    """Total variation of the best product distribution, told once beside the data."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        starts: int = option(64, help="random starts of the search", minimum=1)
        steps: int = option(2000, help="steps of the search", minimum=1)

    def __init__(self, config: ProductBound.Config, *, data: EnumerableData) -> None:
        self.config = config
        self.data = data

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "enumerable", "to know the truth")]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return cls.Config(starts=min(config.starts, 4), steps=min(config.steps, 20))

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        if subject.model != "train":
            return []
        spec = self.data.spec
        bound = best_product(
            self.data.probabilities(),
            spec.vocab_size,
            spec.length,
            starts=self.config.starts,
            steps=self.config.steps,
            seed=0,
        )
        return [Value("best_product_total_variation", float(bound), None, "exact", 0, None)]
