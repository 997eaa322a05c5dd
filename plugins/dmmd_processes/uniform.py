"""Uniform diffusion: noise replaces a token by any other with equal probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmmd_core import FieldError, Process, Schedule, Slot, option, slot


class Uniform(Process):
    """Prior ``1 / V`` on every clean token; all positions carry a loss.

    Two losses: cross-entropy with flat weight, or the posterior Kullback-Leibler divergence in continuous time with
    the ELBO's weight (Schiff et al., "Simple Guidance Mechanisms for Discrete Diffusion Models", arXiv:2412.10193;
    D-MMD paper, appendix D), whose optimum is the leave-one-out distribution and not the mean.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        schedule: Slot = slot("schedule", "linear", help="signal level over time")
        parametrization: Literal["mean", "leave_one_out"] = option(
            "mean", help="what logits mean: E[x | z_t], or E[x_l | z_t without position l]"
        )
        loss: Literal["cross_entropy", "posterior_kl"] = option("cross_entropy", help="loss per position")
        weight: Literal["flat", "elbo"] = option("flat", help="loss weight w(s): 1, or the ELBO's")
        min_time: float = option(
            1e-3, help="the ELBO weight is held constant this near to t = 0 and t = 1", above=0, below=0.5
        )

        def __post_init__(self) -> None:
            """Refuse pairs that are no bound or whose optimum is another."""
            if self.loss == "posterior_kl" and self.parametrization != "leave_one_out":
                raise FieldError(
                    "parametrization",
                    "must be leave_one_out with loss posterior_kl, whose optimum is the leave-one-out distribution",
                )
            if (self.loss == "posterior_kl") != (self.weight == "elbo"):
                raise FieldError(
                    "weight",
                    f"must be {'elbo' if self.loss == 'posterior_kl' else 'flat'} with loss {self.loss}: "
                    "only posterior_kl with its own weight is an ELBO",
                )

    def __init__(self, config: Uniform.Config, *, vocab_size: int, schedule: Schedule) -> None:
        self.config = config
        super().__init__(vocab_size=vocab_size, schedule=schedule, parametrization=config.parametrization)

    def prior(self) -> Tensor:
        """See `Process.prior`."""
        return torch.full((self.vocab_size,), 1.0 / self.vocab_size, dtype=torch.float64)

    def rows_with_loss(self, z_s: Tensor, s: Tensor) -> Tensor:
        """See `Process.rows_with_loss`: every position, whatever its time."""
        return torch.ones_like(z_s, dtype=torch.bool)

    def candidate_losses(self, log_probs: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """See `Process.candidate_losses`."""
        if self.config.loss == "cross_entropy":
            return -log_probs
        return self._posterior_kl(self._leave_one_out(log_probs, z, s), z, s)

    def loss_weight(self, s: Tensor) -> Tensor:
        """See `Process.loss_weight`; for the ELBO ``-alpha' / (V alpha)``."""
        if self.config.weight == "flat":
            return torch.ones_like(s)
        bounded = self._bounded(s)
        return -self.schedule.alpha_prime(bounded) / (self.vocab_size * self.schedule.alpha(bounded))

    def _bounded(self, s: Tensor) -> Tensor:
        return s.double().clamp(self.config.min_time, 1 - self.config.min_time)

    def _leave_one_out(self, log_probs: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """Take the evidence of each position's own token out of the mean: ``log softmax(log_probs - log q(z | x))``."""
        evidence = self.evidence(z, self._bounded(s)).to(log_probs.dtype)
        return log_probs.scatter_add(-1, z.unsqueeze(-1), -evidence.unsqueeze(-1)).log_softmax(-1)

    def _posterior_kl(self, log_y: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """Closed form for every hard target c at once, O(V) a row.

        With ``y_bar = V alpha y + 1 - alpha`` and i = z:
        ``V / y_bar_i - V / x_bar_i + sum_j (x_bar_j / x_bar_i) log(y_bar_i x_bar_j / (y_bar_j x_bar_i))``.
        """
        size = self.vocab_size
        alpha = self.alpha(self._bounded(s)).unsqueeze(-1)
        # x_bar away from the target and at it; subtracted in float64, for float32 has few digits of 1 - alpha near 0.
        low, high = (1 - alpha).to(log_y.dtype), (size * alpha + 1 - alpha).to(log_y.dtype)
        log_bar = (size * alpha.to(log_y.dtype) * log_y.exp() + low).log()
        index = z.unsqueeze(-1)
        log_bar_i = log_bar.gather(-1, index)
        gap = log_bar_i - log_bar  # log(y_bar_i / y_bar_j), zero at j = i
        gap_sum = gap.sum(-1, keepdim=True)
        spread = high.log() - low.log()
        # Target c = i: x_bar_i = high, all others low.
        hit = size / log_bar_i.exp() - size / high + (low / high) * (gap_sum - (size - 1) * spread)
        # Target c != i: x_bar_i = low, x_bar_c = high, all others low.
        miss = size / log_bar_i.exp() - size / low + gap_sum + (high / low - 1) * gap + (high / low) * spread
        is_hit = torch.arange(size, device=z.device) == index
        return torch.where(is_hit, hit, miss)
