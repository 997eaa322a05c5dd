"""Ancestral sampling with exact draws: x ~ Cat(x_hat(z_t)), z_s ~ q(z_s | z_t, x) on the grid 1, 1 - 1/k, ..., 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    Process,
    Sampler,
    Samples,
    UnsupportedError,
    categorical_from_uniform,
    option,
    shape_log_probs,
)

_MAX_STATES = 20_000


class Ancestral(Sampler):
    """One network call a step; logits are made only for the rows that are about to be drawn."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)
        temperature: float = option(1.0, help="temperature of every prediction", above=0)
        top_p: float = option(1.0, help="nucleus of every prediction", above=0, maximum=1)
        top_p_lowering: float | None = option(
            None, help="nats taken off tokens outside the nucleus; null removes them", above=0
        )

    def __init__(self, config: Ancestral.Config, *, process: Process, length: int) -> None:
        self.config = config
        self.process = process
        self.length = length

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"last_step", "distribution"})

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
    ) -> Samples:
        """See `Sampler.sample`."""
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        condition = condition or Condition()
        z = self.process.prior_sample(self.length, draws.at_step(0))
        last = None
        for step in range(num_steps):
            now = draws.at_step(step)
            t, z = self._fix(1 - step / num_steps, z, condition)
            s, _ = self._fix(1 - (step + 1) / num_steps, z, condition)
            prediction = denoiser(z, t, condition, denoiser.draw_latent(now))
            to_draw = self.process.rows_to_draw(z, s, t, now)
            if last_step and step == num_steps - 1:
                last = self._shape(prediction.log_probs()).unflatten(0, z.shape)
                # What is not drawn stays as it is, whatever the denoiser says of it.
                kept = torch.nn.functional.one_hot(z.clamp(max=last.shape[-1] - 1), last.shape[-1]).to(last).log()
                last = torch.where(to_draw.unsqueeze(-1), last, kept)
            index = to_draw.flatten().nonzero().squeeze(-1)
            uniform = now.uniform("x", z.shape[1:]).flatten()
            x = z.clamp(max=self.process.vocab_size - 1).flatten()
            for rows, log_probs in prediction.chunks(index, self.config.chunk_rows or max(1, index.numel())):
                x[rows] = categorical_from_uniform(self._shape(log_probs).exp(), uniform[rows])
                del log_probs
            z = self.process.posterior_sample(x.view_as(z), z, s, t, now)
        return Samples(z, last)

    @torch.no_grad()
    def distribution(self, denoiser: Denoiser, *, num_steps: int) -> Tensor:
        """See `Sampler.distribution`: the transition matrices of all steps, applied to the prior."""
        if denoiser.takes_latent:
            raise UnsupportedError("a denoiser with a latent has no transition matrix; average its last steps instead")
        size, length = self.process.num_inputs, self.length
        if size**length > _MAX_STATES:
            raise UnsupportedError(f"{size}^{length} states are too many to enumerate (at most {_MAX_STATES})")
        states = torch.cartesian_prod(*[torch.arange(size)] * length).reshape(-1, length)
        device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
        states = states.to(device)
        weights = _outer(self.process.prior().to(device).expand(1, length, -1))[0]
        for step in range(num_steps):
            t = torch.full((len(states),), 1 - step / num_steps, dtype=torch.float64, device=device)
            s = torch.full_like(t, 1 - (step + 1) / num_steps)
            moved = torch.zeros_like(weights)
            # States of no weight are left out: a denoiser need not make sense of them.
            for part in (weights > 0).nonzero().squeeze(-1).split(1024):
                z = states[part]
                x_probs = self._shape(denoiser(z, t[part]).log_probs()).double().exp().unflatten(0, z.shape)
                x_probs = x_probs / x_probs.sum(-1, keepdim=True)
                transition = _outer(self.process.posterior_probs(x_probs, z, s[part], t[part]))
                moved += weights[part] @ transition
            weights = moved
        clean = (states < self.process.vocab_size).all(-1)
        return weights[clean].cpu()

    def _shape(self, log_probs: Tensor) -> Tensor:
        config = self.config
        lowering = math.inf if config.top_p_lowering is None else config.top_p_lowering
        return shape_log_probs(log_probs, config.temperature, config.top_p, lowering)

    def _fix(self, time: float, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Times ``[batch]``, or per position with fixed ones at 0, and `z` with the fixed tokens put in."""
        t = torch.full((z.shape[0],), time, dtype=torch.float64, device=z.device)
        if condition.fixed is None:
            return t, z
        if condition.values is None:
            raise ValueError("condition.fixed needs condition.values, the tokens at the fixed positions")
        return (
            torch.where(condition.fixed, 0.0, t.unsqueeze(-1)),
            torch.where(condition.fixed, condition.values, z),
        )


def _outer(probs: Tensor) -> Tensor:
    """Joint distribution of independent positions: ``[n, length, size]`` to ``[n, size ** length]``."""
    joint = probs[:, 0]
    for position in range(1, probs.shape[1]):
        joint = (joint.unsqueeze(-1) * probs[:, position].unsqueeze(1)).flatten(1)
    return joint
