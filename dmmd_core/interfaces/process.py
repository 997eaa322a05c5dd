"""Noise process: how clean tokens are corrupted, restored and scored (DESIGN, "The mathematics").

The base class implements every process of the form ``z_t ~ Cat(alpha_t x + (1 - alpha_t) pi)`` from its stationary
distribution ``pi`` alone; a process states ``pi`` and, where it has one, its own loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.schedule import Schedule

Parametrization = Literal["mean", "leave_one_out"]


def per_position(t: Tensor, like: Tensor) -> Tensor:
    """Give `t` of shape ``[batch]`` or ``[batch, length]`` the shape of `like` ``[batch, length]``."""
    return (t.unsqueeze(-1) if t.ndim == like.ndim - 1 else t).expand_as(like)


class Process(Component, ABC):
    """A discrete noise process over `vocab_size` clean tokens.

    Args:
        vocab_size: Number of clean tokens V; outputs range over these alone.
        schedule: Signal level over time.
        parametrization: What a network's logits mean: the clean mean E[x | z_t] itself, or the leave-one-out
            distribution E[x_l | z_t without position l], to which the evidence of position l is added.
    """

    kind: ClassVar[str] = "process"

    def __init__(self, *, vocab_size: int, schedule: Schedule, parametrization: Parametrization = "mean") -> None:
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        self.vocab_size = vocab_size
        self.schedule = schedule
        self.parametrization = parametrization
        self._prior = self.prior()
        self._prior_cdf = self._prior.cumsum(0)
        self.num_inputs = int(self._prior.shape[0])

    # ---- what a process states -------------------------------------------------------------------------------

    @abstractmethod
    def prior(self) -> Tensor:
        """Stationary distribution pi over input ids, float64 ``[num_inputs]``, ``num_inputs >= vocab_size``."""

    def rows_with_loss(self, z_s: Tensor, s: Tensor) -> Tensor:
        """Positions whose prediction is scored: bool ``[batch, length]``; by default all that are not known."""
        return ~self.known(z_s, s)

    def candidate_losses(self, log_probs: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """Loss of a prediction for every clean token that could be the target; cross-entropy by default.

        Args:
            log_probs: Predicted log mean, ``[rows, vocab]``.
            z: Noisy tokens of these rows, int64 ``[rows]``.
            s: Times of these rows, ``[rows]``.

        Returns:
            ``[rows, vocab]`` in nats, before the weight `loss_weight`.
        """
        return -log_probs

    def loss_weight(self, s: Tensor) -> Tensor:
        """Weight w(s) of a sample's loss, the shape of `s`; flat by default."""
        return torch.ones_like(s)

    # ---- what follows from pi ----------------------------------------------------------------------------------

    def alpha(self, t: Tensor) -> Tensor:
        """Signal level in float64, the shape of `t`."""
        return self.schedule.alpha(t.double())

    def known(self, z_t: Tensor, t: Tensor) -> Tensor:
        """Positions whose clean token is certain: noise cannot make `z_t`, or there is none (t = 0)."""
        return (self._prior_of(z_t) == 0) | (self.alpha(per_position(t, z_t)) == 1)

    def prior_sample(self, length: int, draws: Draws) -> Tensor:
        """Draw z_1 ~ pi at every position, int64 ``[batch, length]``."""
        return self._draw_prior(draws, "prior", (length,))

    def corrupt(self, x: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Draw z_t ~ Cat(alpha_t x + (1 - alpha_t) pi).

        Args:
            x: Clean tokens, int64 ``[batch, length]``.
            t: Times, ``[batch]`` or ``[batch, length]``.
            draws: Source of noise (streams ``corrupt`` and ``corrupt_value``).

        Returns:
            int64 ``[batch, length]``.
        """
        kept = draws.uniform("corrupt", x.shape[1:]) < self.alpha(per_position(t, x))
        noise = self._draw_prior(draws, "corrupt_value", x.shape[1:])
        return torch.where(kept, x, noise)

    def rows_to_draw(self, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Positions whose clean token `posterior_sample` will look at, bool ``[batch, length]``.

        Known before any logits are made. Given the same draws, `posterior_sample` ignores `x` everywhere else.
        """
        prior = self._prior_of(z_t)
        _, from_x, stay, fresh = self._posterior_weights(prior, z_t, s, t)
        undecided = z_t < self.vocab_size  # z_t may equal x, which adds weight to staying
        uniform = draws.uniform("posterior", z_t.shape[1:])
        return (prior > 0) & (undecided | (uniform * (from_x + stay + fresh) < from_x)) & ~self.known(z_t, t)

    def posterior_sample(self, x: Tensor, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        """Draw z_s ~ q(z_s | z_t, x), where `q ∝ [a z_t + (1 - a) <pi, z_t>] * [alpha_s x + (1 - alpha_s) pi]`.

        The product has four terms: both agree, take x, stay at z_t, a fresh draw from pi; no tensor over the
        vocabulary is made.

        Args:
            x: Clean tokens, int64 ``[batch, length]``; ignored outside `rows_to_draw` and at known positions.
            z_t: Noisy tokens, int64 ``[batch, length]``.
            s: Target times, ``[batch]`` or ``[batch, length]``, ``s <= t``; s = t gives z_t back.
            t: Times of `z_t`.
            draws: Source of noise (streams ``posterior`` and ``posterior_value``).

        Returns:
            int64 ``[batch, length]``.
        """
        prior = self._prior_of(z_t)
        both, from_x, stay, fresh = self._posterior_weights(prior, z_t, s, t)
        both = both * (x == z_t)
        point = draws.uniform("posterior", z_t.shape[1:]) * (both + from_x + stay + fresh)
        noise = self._draw_prior(draws, "posterior_value", z_t.shape[1:])
        moved = torch.where(point < from_x, x, torch.where(point < from_x + stay + both, z_t, noise))
        return torch.where(self.known(z_t, t), z_t, moved)

    def posterior_probs(self, x_probs: Tensor, z_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Distribution of z_s when x ~ Cat(x_probs) independently per position, float64.

        Args:
            x_probs: ``[batch, length, vocab]``.
            z_t: int64 ``[batch, length]``.
            s: Target times.
            t: Times of `z_t`.

        Returns:
            ``[batch, length, num_inputs]``: the sum over x of x_probs(x) q(z_s | z_t, x).
        """
        prior = self._prior_of(z_t)
        both, from_x, stay, fresh = self._posterior_weights(prior, z_t, s, t)
        x_probs = x_probs.double()
        stay_at = torch.nn.functional.one_hot(z_t, self.num_inputs).double()
        pad = torch.zeros(*x_probs.shape[:-1], self.num_inputs - self.vocab_size, dtype=x_probs.dtype)
        padded = torch.cat((x_probs, pad.to(x_probs.device)), dim=-1)
        agrees = (padded * stay_at).sum(-1)  # probability that x = z_t
        others = padded * (1 - stay_at)
        base = from_x + stay + fresh
        safe = torch.where(base > 0, base, 1.0)
        fresh_part = fresh.unsqueeze(-1) * self._prior.to(z_t.device)
        stay_part = stay.unsqueeze(-1) * stay_at
        differs = (
            from_x.unsqueeze(-1) * others + others.sum(-1, keepdim=True) * (stay_part + fresh_part)
        ) / safe.unsqueeze(-1)
        same_total = base + both
        safe_same = torch.where(same_total > 0, same_total, 1.0)
        same = (
            agrees.unsqueeze(-1)
            * ((from_x + both).unsqueeze(-1) * stay_at + stay_part + fresh_part)
            / safe_same.unsqueeze(-1)
        )
        return torch.where(self.known(z_t, t).unsqueeze(-1), stay_at, differs + same)

    def evidence(self, z: Tensor, t: Tensor) -> Tensor:
        """Log of q(z | x = z) / q(z | x != z), ``log(1 + alpha / ((1 - alpha) pi_z))``; infinite where z is known.

        Args:
            z: Noisy tokens, int64, any shape.
            t: Times of the same shape.

        Returns:
            float64 of that shape; zero for input ids that are no clean token.
        """
        alpha = self.alpha(t)
        ratio = torch.log1p(alpha / ((1 - alpha) * self._prior_of(z)))
        return torch.where(z < self.vocab_size, ratio, 0.0)

    def clean_posterior(self, log_probs: Tensor, z_t: Tensor, z_s: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Update a distribution of x given z_t by the news of z_s: ``p(x) q(z_s | z_t, x)``, normalised.

        As a function of x, q(z_s | z_t, x) differs from a constant only at x = z_s and at x = z_t.

        Args:
            log_probs: Log of p(x), ``[rows, vocab]``.
            z_t: Noisy tokens at t, int64 ``[rows]``.
            z_s: Noisy tokens at s <= t, int64 ``[rows]``.
            s: Times of `z_s`, ``[rows]``.
            t: Times of `z_t`, ``[rows]``.

        Returns:
            Log-probabilities ``[rows, vocab]``.
        """
        both, from_x, stay, fresh = self._posterior_weights(self._prior_of(z_t), z_t, s, t)
        base = from_x + stay + fresh
        news_s = torch.where(self.known(z_s, s), 0.0, self.evidence(z_s, s))
        news_t = torch.where((z_t < self.vocab_size) & (base > 0), -torch.log1p(both / base), 0.0)
        shifted = log_probs
        for token, news in ((z_s, news_s), (z_t, news_t)):
            place = token.clamp(max=self.vocab_size - 1).unsqueeze(-1)
            shifted = shifted.scatter_add(-1, place, news.to(log_probs.dtype).unsqueeze(-1))
        carried = torch.full_like(log_probs, -torch.inf).scatter_(
            -1, z_s.clamp(max=self.vocab_size - 1).unsqueeze(-1), 0.0
        )
        return torch.where(self.known(z_s, s).unsqueeze(-1), carried, shifted.log_softmax(-1))

    def clean_log_probs(self, logits: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Turn a network's logits into the log of the clean mean E[x | z_t].

        Args:
            logits: ``[rows, vocab]``, float32 or float64.
            z: Noisy tokens of these rows, int64 ``[rows]``.
            t: Times of these rows, ``[rows]``.

        Returns:
            ``[rows, vocab]``; known positions carry their token over (0 at the token, -inf elsewhere).
        """
        known = self.known(z, t)
        token = z.clamp(max=self.vocab_size - 1).unsqueeze(-1)
        if self.parametrization == "leave_one_out":
            evidence = torch.where(known, 0.0, self.evidence(z, t)).to(logits.dtype)
            logits = logits.scatter_add(-1, token, evidence.unsqueeze(-1))
        log_probs = logits.log_softmax(-1)
        del logits
        carried = torch.full_like(log_probs, -torch.inf).scatter_(-1, token, 0.0)
        return torch.where(known.unsqueeze(-1), carried, log_probs)

    def row_losses(self, target: Tensor, log_probs: Tensor, z: Tensor, s: Tensor) -> Tensor:
        """Loss of a prediction against a hard or a soft target.

        Args:
            target: Hard targets int64 ``[rows]`` or soft targets ``[rows, vocab]``.
            log_probs: ``[rows, vocab]``.
            z: Noisy tokens of these rows, int64 ``[rows]``.
            s: Times of these rows, ``[rows]``.

        Returns:
            ``[rows]`` in nats.
        """
        losses = self.candidate_losses(log_probs, z, s)
        if target.dtype == torch.int64:
            return losses.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        # A soft target of exactly zero asks nothing of its candidate, whose loss may be infinite.
        return torch.where(target > 0, target * losses, 0.0).sum(-1)

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _prior_of(self, z: Tensor) -> Tensor:
        if self._prior.device != z.device:
            self._prior = self._prior.to(z.device)
        return self._prior[z]

    @cached_property
    def _atoms(self) -> list[int]:
        """Input ids of some prior mass."""
        return [token for token, mass in enumerate(self._prior.tolist()) if mass > 0]

    def _draw_prior(self, draws: Draws, stream: str, shape: Sequence[int]) -> Tensor:
        """Draw from pi, int64 ``[batch, *shape]``; where pi is one token there is nothing to draw."""
        if len(self._atoms) == 1:
            return torch.full((draws.batch, *shape), self._atoms[0], device=draws.device)
        uniform = draws.uniform(stream, shape)
        if self._prior_cdf.device != uniform.device:
            self._prior_cdf = self._prior_cdf.to(uniform.device)
        return torch.searchsorted(self._prior_cdf, uniform, right=True).clamp_(max=self._atoms[-1])

    def _posterior_weights(
        self, prior: Tensor, z_t: Tensor, s: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, t = per_position(s, z_t), per_position(t, z_t)
        alpha_s, alpha_t = self.alpha(s), self.alpha(t)
        ratio = torch.where((s == t) | (alpha_s == 0), 1.0, alpha_t / alpha_s.clamp_min(1e-300))
        both = ratio * alpha_s
        from_x = (1 - ratio) * prior * alpha_s
        stay = ratio * (1 - alpha_s) * prior
        fresh = (1 - ratio) * prior * (1 - alpha_s)
        return both, from_x, stay, fresh
