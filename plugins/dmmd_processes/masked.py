"""Masked (absorbing) diffusion: every token is either itself or [MASK]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import Process, Schedule, Slot, option, slot


class Masked(Process):
    """All prior mass on [MASK], input id ``vocab_size``; [MASK] is never an output.

    The ELBO weight is ``-alpha' / (1 - alpha)`` (Sahoo et al., arXiv:2406.07524; Shi et al., arXiv:2406.04329).
    Both parametrisations of a network coincide here: visible tokens are carried over, masked ones carry no evidence.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        schedule: Slot = slot("schedule", "linear", help="signal level over time")
        weight: Literal["flat", "elbo"] = option("flat", help="loss weight w(s): 1, or the ELBO's")
        min_time: float = option(1e-3, help="the ELBO weight is held constant below this time", above=0, below=1)

    def __init__(self, config: Masked.Config, *, vocab_size: int, schedule: Schedule) -> None:
        self.config = config
        super().__init__(vocab_size=vocab_size, schedule=schedule)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """Soft targets are exact: a position that is still masked tells nothing about its clean token."""
        return frozenset({"masks", "soft_targets"})

    def prior(self) -> Tensor:
        """See `Process.prior`."""
        prior = torch.zeros(self.vocab_size + 1, dtype=torch.float64)
        prior[-1] = 1.0
        return prior

    def loss_weight(self, s: Tensor) -> Tensor:
        """See `Process.loss_weight`."""
        if self.config.weight == "flat":
            return torch.ones_like(s)
        bounded = s.double().clamp_min(self.config.min_time)
        return -self.schedule.alpha_prime(bounded) / (1 - self.schedule.alpha(bounded))
