"""Di4C, distillation through dimensional correlations (Hayakawa et al., arXiv:2410.08709).

The student is a mixture ``p(x | z_t) = E_latent[ prod_l p_l(x_l | z_t, latent) ]``, whose joint probabilities are
estimated with several latents for one input. Losses: near t = 0 each component learns the teacher (distillation);
elsewhere the mixture at z_t learns its own samples one small step of the teacher below (consistency); and everywhere
the mixture learns the data (data prediction). The last two are split into marginals, which are known in full, and the
correlation ``log p(x) - sum_l log p_l(x_l)`` of a sample x: the control variate of section 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmmd_core import (
    Batch,
    Condition,
    Denoiser,
    Draws,
    Losses,
    Objective,
    Player,
    Process,
    Requirement,
    categorical_from_uniform,
    option,
    rows_with_loss,
    training_condition,
)
from dmmd_objectives.steps import ancestral_step


def log_mean(log_p: Tensor) -> Tensor:
    """Log of the mean over the latents, which are the first axis."""
    return log_p.logsumexp(0) - math.log(log_p.shape[0])


def sum_by_sample(values: Tensor, sample: Tensor, count: int) -> Tensor:
    """Sum rows of one sample: ``[..., rows]`` to ``[..., count]``."""
    return values.new_zeros(*values.shape[:-1], count).index_add(-1, sample, values)


def correlation(log_p: Tensor, tokens: Tensor, sample: Tensor, count: int) -> Tensor:
    """``log p(x) - sum_l log p_l(x_l)`` of the mixture, ``[..., count]``; zero for a product distribution.

    Args:
        log_p: Of every latent's component, ``[latents, rows, vocab]``.
        tokens: x at the rows, int64 ``[..., rows]``.
        sample: The sample that a row belongs to, int64 ``[rows]``.
        count: Number of samples.
    """
    # [..., latents, rows]
    index = tokens.unsqueeze(-2).expand(*tokens.shape[:-1], log_p.shape[0], tokens.shape[-1])
    chosen = log_p.expand(*tokens.shape[:-1], *log_p.shape).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    joint = log_mean(sum_by_sample(chosen, sample, count).movedim(-2, 0))
    return joint - sum_by_sample(log_mean(chosen.movedim(-2, 0)), sample, count)


def divergence(log_target: Tensor, log_p: Tensor) -> Tensor:
    """KL(target, p) of each row, ``[..., rows]``."""
    target = log_target.exp()
    return (torch.special.xlogy(target, target) - target * log_p).sum(-1)


class MixtureDistillation(Objective):
    """Di4C with `latents` components for each input; all rows' logits of all of them are alive at once."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        latents: int = option(4, help="latents drawn for each noisy input", minimum=2)
        teacher_steps: int = option(64, help="steps of the teacher, over one of which consistency is taken", minimum=1)
        distill_below: float = option(0.05, help="below this time each component learns the teacher", above=0, below=1)
        distill_share: float = option(
            0.3, help="share of examples whose time is drawn below distill_below", above=0, below=1
        )
        data_weight: float = option(1.0, help="weight of the data's correlation; 0 learns none from data", minimum=0)
        data_schedule: Literal["constant", "linear", "sigmoid"] = option(
            "linear", help="how that weight rises with time: 1, t or sigmoid(20 (t - 1/2))"
        )

    def __init__(
        self, config: MixtureDistillation.Config, *, process: Process, network: Denoiser, teacher: Denoiser
    ) -> None:
        if not network.takes_latent:
            raise ValueError("objective 'di4c' trains a mixture and needs a generator with input noise")
        self.config = config
        self.process = process
        self.student = network
        self.teacher = teacher

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"distills"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("generator", "latent", "to train a mixture")]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return dataclasses.replace(config, latents=2)

    def players(self) -> dict[str, Player]:
        """See `Objective.players`."""
        return {"student": Player(self.student, result=True)}

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return {"teacher": self.teacher}

    def draw_times(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """Draw t, and ``s = t - min(1/T, t/2)`` of the teacher's step below it; float64 ``[batch]`` each."""
        border = self.config.distill_below
        u = draws.uniform("t")
        t = torch.where(draws.uniform("near") < self.config.distill_share, border * u, border + (1 - border) * u)
        return t - (t / 2).clamp(max=1 / self.config.teacher_steps), t

    def data_weights(self, t: Tensor) -> Tensor:
        """Weight of the data's correlation at `t`, ``[batch]``."""
        rise = {"constant": torch.ones_like(t), "linear": t, "sigmoid": torch.sigmoid(20 * (t - 0.5))}
        return self.config.data_weight * rise[self.config.data_schedule]

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        s, t = self.draw_times(draws)
        x = batch.tokens
        z_t = self.process.corrupt(x, t, draws)
        rows = rows_with_loss(self.process, z_t, t)
        sample, count = rows.index // x.shape[1], len(x)
        condition = training_condition(self.student, batch)
        with torch.no_grad():
            teacher = self.teacher(z_t, t, condition)
            below = [
                ancestral_step(self.process, teacher, z_t, s, t, draws.within(f"below{number}"))[1]
                for number in range(self.config.latents)
            ]
            log_theta = teacher.log_probs(rows.index)
            log_below = self._components(torch.cat(below), s, condition, draws.within("below"), rows.index)
            uniform = torch.stack(
                [
                    draws.within(f"answer{number}").uniform("x", x.shape[1:]).flatten()[rows.index]
                    for number in range(self.config.latents)
                ]
            )
            drawn = categorical_from_uniform(log_below.exp(), uniform)  # [latents, rows]
        many = torch.cat([z_t] * self.config.latents)
        log_p = self._components(many, t, condition, draws, rows.index)
        log_theta, log_below = log_theta.to(log_p.dtype), log_below.to(log_p.dtype)
        parts = {
            "distillation": sum_by_sample(divergence(log_theta, log_p), sample, count).mean(0),
            "marginals": sum_by_sample(divergence(log_theta, log_mean(log_p)), sample, count),
            "data_correlation": -correlation(log_p, x.flatten()[rows.index], sample, count),
            "consistency": sum_by_sample(divergence(log_mean(log_below), log_mean(log_p)), sample, count)
            - correlation(log_p, drawn, sample, count).mean(0),
        }
        near = t < self.config.distill_below
        weight = self.process.loss_weight(t).to(log_p.dtype) / x.numel()
        total = (
            torch.where(near, parts["distillation"], parts["consistency"])
            + parts["marginals"]
            + self.data_weights(t).to(log_p.dtype) * parts["data_correlation"]
        )
        loss = (weight * total).sum()
        metrics = {name: (weight * part.detach()).sum() for name, part in parts.items()}
        return Losses({"student": loss}, {"student_loss": loss.detach(), **metrics})

    def _components(self, z: Tensor, t: Tensor, condition: Condition, draws: Draws, index: Tensor) -> Tensor:
        """Log-probabilities of chosen rows under a latent of its own for each copy, ``[latents, rows, vocab]``.

        Args:
            z: Noisy tokens of all copies, int64 ``[latents * batch, length]``.
            t: Times of one copy, ``[batch]``.
            condition: Of one copy.
            draws: Source of the latents.
            index: Rows of one copy.
        """
        copies = self.config.latents
        latent = torch.cat([_drawn(self.student.draw_latent(draws.within(f"latent{n}"))) for n in range(copies)])
        label = None if condition.label is None else torch.cat([condition.label] * copies)
        prediction = self.student(z, torch.cat([t] * copies), Condition(label=label), latent)
        size = z.numel() // copies
        chosen = torch.cat([index + number * size for number in range(copies)])
        return prediction.log_probs(chosen).unflatten(0, (copies, -1))


def _drawn(latent: Tensor | None) -> Tensor:
    assert latent is not None  # refused by the constructor
    return latent
