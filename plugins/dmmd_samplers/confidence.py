"""Sampling by confidence (MaskGIT; Chang et al., arXiv:2202.04200): of all drawn tokens the surest stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    Requirement,
    Samples,
    categorical_from_uniform,
    option,
)
from dmmd_samplers.shaped import ShapedConfig, ShapedSampler, fix_tokens, times_of


def masked_share(step: int, num_steps: int) -> float:
    """Share of the free positions that are masked before a step: ``cos(pi / 2 * step / num_steps)``, exactly 0 last."""
    return math.sin(0.5 * math.pi * (1 - step / num_steps))


class Confidence(ShapedSampler):
    """Draws every masked position, keeps the surest and masks the others again, on a cosine schedule; one call a step.

    A position's confidence is ``log p(x) + confidence_temperature * (1 - (step + 1) / num_steps) * Gumbel noise``. The
    network is shown the time at which its process masks as large a share. Unlike ancestral sampling this does not tend
    to the teacher's distribution with the number of steps: it trades diversity for likelihood.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ShapedConfig):
        """Parameters."""

        confidence_temperature: float = option(
            4.5, help="scale of the noise on confidences, which falls to 0 with the steps", minimum=0
        )

    config: Confidence.Config

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"last_step"} if config.guidance == 1.0 else {"last_step", "guides"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("process", "masks", "to mask unsure tokens again"), *config.requirements()]

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
        length: int | None = None,
    ) -> Samples:
        """See `Sampler.sample`."""
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        condition = condition or Condition()
        denoiser = self.prepared(denoiser)
        length = length or self.length
        z = fix_tokens(self.process.prior_sample(length, draws.at_step(0)), condition)
        free = (z == self.process.vocab_size).sum(-1)
        last = None
        for step in range(num_steps):
            now = draws.at_step(step)
            t = self._times(step, num_steps, z, condition)
            prediction = denoiser(z, t, condition, denoiser.draw_latent(now, length))
            masked = z == self.process.vocab_size
            if last_step and step == num_steps - 1:
                last = self._last_log_probs(prediction, z, masked)
            index = masked.flatten().nonzero().squeeze(-1)
            uniform = now.uniform("x", z.shape[1:]).flatten()
            x = z.flatten().clone()
            sureness = torch.full(x.shape, math.inf, dtype=torch.float64, device=x.device)
            for rows, log_probs in prediction.chunks(index, self.chunk_rows):
                shaped = self.config.shape(log_probs)
                x[rows] = categorical_from_uniform(shaped.exp(), uniform[rows])
                sureness[rows] = shaped.gather(-1, x[rows].unsqueeze(-1)).squeeze(-1).double()
            count = self._remaining(step + 1, num_steps, free, masked)
            noise = self.config.confidence_temperature * (1 - (step + 1) / num_steps)
            z = torch.where(_least_sure(sureness.view_as(z), count, noise, now), self.process.vocab_size, x.view_as(z))
        return Samples(z, last)

    def _times(self, step: int, num_steps: int, z: Tensor, condition: Condition) -> Tensor:
        """Time at which the process masks the step's share, ``[batch]``; per position with fixed ones at 0."""
        wanted = 1 - masked_share(step, num_steps)
        low, high = 0.0, 1.0
        for _ in range(60):  # the signal level falls: halve the interval down to float64's resolution
            middle = (low + high) / 2
            above = float(self.process.alpha(torch.tensor(middle, dtype=torch.float64))) > wanted
            low, high = (middle, high) if above else (low, middle)
        return times_of(high, z, condition)

    def _remaining(self, step: int, num_steps: int, free: Tensor, masked: Tensor) -> Tensor:
        """How many positions are masked before a step, int64 ``[batch]``: at least one, and fewer than the step before.

        None at the end; a single one that is left early waits for the last step.
        """
        if step == num_steps:
            return torch.zeros_like(free)
        wanted = (free * masked_share(step, num_steps)).floor().long()
        now = masked.sum(-1)
        return torch.minimum(wanted, now - 1).clamp_min(1).minimum(now)


def _least_sure(sureness: Tensor, count: Tensor, noise: float, draws: Draws) -> Tensor:
    """The `count` positions of each sample that are least sure once Gumbel noise is added, bool ``[batch, length]``."""
    if noise > 0:
        sureness = sureness - noise * (-draws.uniform("confidence", sureness.shape[1:]).log()).log()
    return sureness.argsort(dim=-1, stable=True).argsort(-1) < count.unsqueeze(-1)
