"""Hybrid diffusion: noise turns a token into [MASK] or into any token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core import Process, Schedule, Slot, option, slot


class Hybrid(Process):
    """Prior ``mask_share`` on [MASK], input id ``vocab_size``, and the rest spread evenly over the V clean tokens.

    The idea of mixing both kinds of noise is that of GIDD (von Ruette et al., "Generalized Interpolating Discrete
    Diffusion", arXiv:2503.04482). What differs: there the mixture changes with time and [MASK] alone is left at
    t = 1, here it is constant, so that the process keeps the form ``alpha_t x + (1 - alpha_t) pi`` and the base class
    does all the mathematics. The loss is the base class's cross-entropy with flat weight.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        mask_share: float = option(0.5, help="share of the noise that masks; the rest is uniform", above=0, below=1)
        schedule: Slot = slot("schedule", "linear", help="signal level over time")

    def __init__(self, config: Hybrid.Config, *, vocab_size: int, schedule: Schedule) -> None:
        self.config = config
        super().__init__(vocab_size=vocab_size, schedule=schedule)

    def prior(self) -> Tensor:
        """See `Process.prior`."""
        share = self.config.mask_share
        prior = torch.full((self.vocab_size + 1,), (1 - share) / self.vocab_size, dtype=torch.float64)
        prior[-1] = share
        return prior
