"""Ancestral sampling with exact draws: x ~ Cat(x_hat(z_t)), z_s ~ q(z_s | z_t, x) on k times from 1 to 0."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    Prediction,
    Requirement,
    Samples,
    UnsupportedError,
    categorical_from_uniform,
    option,
)
from dmmd_samplers.shaped import ShapedConfig, ShapedSampler, fix_tokens, times_of

_MAX_STATES = 20_000


class Ancestral(ShapedSampler):
    """At most one network call a step; logits are made only for the rows that are about to be drawn.

    Which rows these are is known before the network is asked: a sample of which nothing is drawn in a step is left out
    of the call, exactly and whatever the network, for its tokens do not change. With the masked process and more steps
    than tokens that is most of them (the cache of Sahoo et al., arXiv:2406.07524, needs a network without time and a
    whole batch without change).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ShapedConfig):
        """Parameters."""

        times: Literal["uniform", "cosine"] = option(
            "uniform",
            help="steps of one length, or t = cos(pi i / (2k)): short ones first, while there is little context",
        )

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`; a guided sampler needs labels, which no enumeration has."""
        return frozenset({"last_step", "distribution"} if config.guidance == 1.0 else {"last_step", "guides"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return config.requirements()

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
        z = self.process.prior_sample(length, draws.at_step(0))
        last = None
        times = self._times(num_steps)
        for step in range(num_steps):
            now = draws.at_step(step)
            z = fix_tokens(z, condition)
            t, s = (times_of(times[number], z, condition) for number in (step, step + 1))
            if last_step and step == num_steps - 1:
                to_draw = self.process.rows_to_draw(z, s, t, now)
                prediction = denoiser(z, t, condition, denoiser.draw_latent(now, length))
                last = self._last_log_probs(prediction, z, to_draw)
                z = self._next(z, self._draw(prediction, z, to_draw, now), s, t, now)
            else:
                z = self.step(denoiser, z, s, t, now, condition)
        return Samples(z, last)

    @torch.no_grad()
    def step(self, denoiser: Denoiser, z: Tensor, s: Tensor, t: Tensor, draws: Draws, condition: Condition) -> Tensor:
        """One step of `sample`, from z_t to z_s.

        Args:
            denoiser: Teacher or student, `prepared`.
            z: Noisy tokens at t, int64 ``[batch, length]``.
            s: Target times, ``[batch]`` or ``[batch, length]``.
            t: Times of `z`.
            draws: Source of noise, at a step of its own.
            condition: As for `sample`.

        Returns:
            int64 ``[batch, length]``.
        """
        to_draw = self.process.rows_to_draw(z, s, t, draws)
        busy = to_draw.any(-1)
        x, length = z, z.shape[1]
        if bool(busy.any()):
            if condition.context is not None or bool(busy.all()):
                prediction = denoiser(z, t, condition, denoiser.draw_latent(draws, length))
                x = self._draw(prediction, z, to_draw, draws)
            else:
                asked = busy.nonzero().squeeze(-1)
                some = draws.select(asked)
                prediction = denoiser(z[asked], t[asked], condition.select(asked), denoiser.draw_latent(some, length))
                x = z.index_copy(0, asked, self._draw(prediction, z[asked], to_draw[asked], some))
        return self._next(z, x, s, t, draws)

    def step_times(self, left: Tensor) -> Tensor:
        """See `Sampler.step_times`; the cosine is the sampling grid of Shi et al. (arXiv:2406.04329)."""
        return left if self.config.times == "uniform" else torch.sin(0.5 * math.pi * left)

    def _times(self, num_steps: int) -> list[float]:
        """The times between which `num_steps` steps lead, from 1 to 0."""
        left = torch.tensor([1 - step / num_steps for step in range(num_steps + 1)], dtype=torch.float64)
        return self.step_times(left).tolist()

    def _draw(self, prediction: Prediction, z: Tensor, to_draw: Tensor, draws: Draws) -> Tensor:
        """Draw ``x ~ Cat(p)`` at the positions `to_draw`, ``[batch, length]``; elsewhere it is `z`."""
        index = to_draw.flatten().nonzero().squeeze(-1)
        uniform = draws.uniform("x", z.shape[1:]).flatten()
        x = z.flatten().clone()
        for rows, log_probs in prediction.chunks(index, self.chunk_rows):
            x[rows] = categorical_from_uniform(self.config.shape(log_probs).exp(), uniform[rows])
            del log_probs
        return x.view_as(z)

    def _next(self, z: Tensor, x: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return self.process.posterior_sample(x.clamp(max=self.process.vocab_size - 1), z, s, t, draws)

    @torch.no_grad()
    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> Tensor:
        """See `Sampler.distribution`: the transition matrices of all steps, applied to the prior."""
        if self.config.guidance != 1.0:
            raise UnsupportedError("a guided sampler needs labels, which an enumeration has not; count samples instead")
        if denoiser.takes_latent:
            raise UnsupportedError("a denoiser with a latent has no transition matrix; average its last steps instead")
        size, length = self.process.num_inputs, length or self.length
        if size**length > _MAX_STATES:
            raise UnsupportedError(f"{size}^{length} states are too many to enumerate (at most {_MAX_STATES})")
        states = torch.cartesian_prod(*[torch.arange(size)] * length).reshape(-1, length)
        device = device_of(denoiser)
        states = states.to(device)
        condition = Condition(context=context)
        times = self._times(num_steps)
        weights = _outer(self.process.prior().to(device).expand(1, length, -1))[0]
        for step in range(num_steps):
            t, s = (
                torch.full((len(states),), times[number], dtype=torch.float64, device=device)
                for number in (step, step + 1)
            )
            moved = torch.zeros_like(weights)
            # States of no weight are left out: a denoiser need not make sense of them.
            for part in (weights > 0).nonzero().squeeze(-1).split(1024):
                z = states[part]
                log_probs = self.config.shape(denoiser(z, t[part], condition).log_probs())
                x_probs = log_probs.double().exp().unflatten(0, z.shape)
                x_probs = x_probs / x_probs.sum(-1, keepdim=True)
                transition = _outer(self.process.posterior_probs(x_probs, z, s[part], t[part]))
                moved += weights[part] @ transition
            weights = moved
        clean = (states < self.process.vocab_size).all(-1)
        return weights[clean].cpu()


def device_of(denoiser: Denoiser) -> torch.device:
    """Where a denoiser's weights or tables are."""
    tensors = itertools.chain(denoiser.parameters(), denoiser.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def _outer(probs: Tensor) -> Tensor:
    """Joint distribution of independent positions: ``[n, length, size]`` to ``[n, size ** length]``."""
    joint = probs[:, 0]
    for position in range(1, probs.shape[1]):
        joint = (joint.unsqueeze(-1) * probs[:, position].unsqueeze(1)).flatten(1)
    return joint
