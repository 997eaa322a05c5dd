"""Signal levels over time, each exactly 1 at t = 0 and exactly 0 at t = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core import Schedule, option


class Linear(Schedule):
    """``alpha = 1 - t``."""

    def __init__(self, config: Linear.Config) -> None:
        self.config = config

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`."""
        return (1 - t).clamp(0, 1)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha_prime`."""
        return -torch.ones_like(t)


class Cosine(Schedule):
    """``alpha = cos(pi t / 2)`` (Nichol and Dhariwal, arXiv:2102.09672, without the square)."""

    def __init__(self, config: Cosine.Config) -> None:
        self.config = config

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`; written as a sine, which is exactly 0 at t = 1."""
        return torch.sin(0.5 * math.pi * (1 - t)).clamp(0, 1)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha_prime`."""
        return -0.5 * math.pi * torch.cos(0.5 * math.pi * (1 - t))


class MaskGITCosine(Schedule):
    """``alpha = 1 - cos(pi (1 - t) / 2)``: few tokens drawn in the first steps and many in the last.

    MaskGIT's share of masked tokens (Chang et al., arXiv:2202.04200) as a signal level; the ``cosine``
    of Shi et al., "Simplified and Generalized Masked Diffusion" (arXiv:2406.04329).
    """

    def __init__(self, config: MaskGITCosine.Config) -> None:
        self.config = config

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`; in two forms, exact at both ends and with all digits near t = 1."""
        late = 2 * torch.sin(0.25 * math.pi * (1 - t)) ** 2
        return torch.where(t < 0.5, 1 - torch.sin(0.5 * math.pi * t), late).clamp(0, 1)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha_prime`; exactly 0 at t = 1."""
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * (1 - t))


class Polynomial(Schedule):
    """``alpha = 1 - t ** power`` (Shi et al., "Simplified and Generalized Masked Diffusion", arXiv:2406.04329)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        power: float = option(2.0, help="exponent of t; 1 is the linear schedule", above=0)

    def __init__(self, config: Polynomial.Config) -> None:
        self.config = config

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`."""
        return (1 - t**self.config.power).clamp(0, 1)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha_prime`; minus infinity at t = 0 for powers below 1."""
        return -self.config.power * t ** (self.config.power - 1)
