"""Discrete Moment Matching Distillation (arXiv:2603.20155, algorithm 1).

``min_student max_auxiliary E[ L_s(x, teacher) - L_s(x, auxiliary) - L_s(teacher, auxiliary) ]``: the auxiliary
learns the average of the teacher and of the student's own E[x | z_s]; the student moves to where both agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmmd_core import (
    Batch,
    Denoiser,
    Draws,
    Losses,
    Objective,
    Player,
    Prediction,
    Process,
    Requirement,
    Rows,
    ShapedDenoiser,
    categorical_from_uniform,
    option,
    per_position,
    rows_with_loss,
    sum_over_rows,
    times_per_position,
    times_per_sample,
    training_condition,
)


class MomentMatching(Objective):
    """D-MMD with alternate turns, or with both turns on one draw (7 forward passes instead of 10)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        turns: Literal["joint", "alternate"] = option(
            "joint", help="update both players on one draw, or student and auxiliary in turn"
        )
        times: Literal["interval", "grid"] = option(
            "interval",
            help="t = s + delta with delta ~ U(0, 1/k), as in algorithm 1, or the next of the k times a sampler visits",
        )
        auxiliary_target: Literal["hard", "soft", "posterior"] = option(
            "hard",
            help="auxiliary learns from the drawn tokens, from the student's probabilities (masked only), or from "
            "those given z_s as well (any process, least noise)",
        )
        auxiliary_learning_rate_scale: float = option(
            1.0, help="auxiliary's learning rate as a multiple of the student's", above=0
        )
        temperature: float = option(1.0, help="temperature of the teacher, absorbed by the student", above=0)
        top_p: float = option(1.0, help="nucleus of the teacher, absorbed by the student", above=0, maximum=1)
        top_p_lowering: float = option(2.0, help="nats taken off tokens outside the nucleus", above=0)
        probability_floor: float = option(
            1e-6, help="smallest teacher and auxiliary probability in the student's loss", above=0, below=1
        )
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    def __init__(
        self,
        config: MomentMatching.Config,
        *,
        process: Process,
        network: Denoiser,
        teacher: Denoiser,
        copy_teacher: Callable[[], Denoiser],
        num_steps: int,
    ) -> None:
        self.config = config
        self.process = process
        self.student = network
        self.auxiliary = copy_teacher()
        self.num_steps = num_steps
        shaped = config.temperature != 1.0 or config.top_p != 1.0
        self.teacher = (
            ShapedDenoiser(
                teacher, temperature=config.temperature, top_p=config.top_p, lowering=config.top_p_lowering
            )
            if shaped
            else teacher
        )

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"blocks", "distills"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        if config.auxiliary_target != "soft":
            return []
        reason = "a soft target is exact only where z_s tells nothing about the position's token"
        return [Requirement("process", "soft_targets", reason, "auxiliary_target")]

    def players(self) -> dict[str, Player]:
        """See `Objective.players`."""
        return {
            "student": Player(self.student, result=True),
            "auxiliary": Player(self.auxiliary, learning_rate_scale=self.config.auxiliary_learning_rate_scale),
        }

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return {"teacher": self.teacher}

    def turn(self, step: int) -> tuple[str, ...]:
        """See `Objective.turn`."""
        if self.config.turns == "joint":
            return ("student", "auxiliary")
        return ("auxiliary",) if step % 2 else ("student",)

    def draw_times(self, draws: Draws, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw s ~ U(0, 1) and the t it comes from; float64 ``[batch, *shape]`` each.

        ``interval``: t = min(1, s + delta), delta ~ U(0, 1/k) (algorithm 1). ``grid``: t = ceil(k s) / k, the time from
        which a sampler of k steps crosses s, so that the student practises the steps it will take and no others.
        """
        s = draws.uniform("s", shape)
        if self.config.times == "grid":
            return s, (s * self.num_steps).ceil() / self.num_steps
        return s, (s + draws.uniform("delta", shape) / self.num_steps).clamp(max=1)

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`; the numbers are those of algorithm 1."""
        times = self.draw_times(draws, times_per_sample(self.student, batch))  # 1
        s, t = (times_per_position(self.student, time) for time in times)
        z_t = self.process.corrupt(batch.tokens, t, draws)
        condition = training_condition(self.student, batch)
        latent = self.student.draw_latent(draws)
        with torch.set_grad_enabled("student" in turn):
            prediction = self.student(z_t, t, condition, latent)
        x, z_s = self._draw_z_s(prediction, z_t, s, t, draws)  # 2
        with torch.no_grad():
            teacher = self.teacher(z_s, s, condition)
        with torch.set_grad_enabled("auxiliary" in turn):
            auxiliary = self.auxiliary(z_s, s, condition)
        totals = sum_over_rows(
            rows_with_loss(self.process, z_s, s),
            lambda rows: self._row_losses(rows, turn, x, (z_t, t), prediction, teacher, auxiliary),  # 3
            self.config.chunk_rows,
        )
        by_player = {name: totals[place] for place, name in enumerate(("student", "auxiliary")) if name in turn}
        metrics = {f"{name}_loss": value.detach() for name, value in by_player.items()}
        metrics["student_entropy"] = totals[2].detach()
        metrics["teacher_auxiliary_gap"] = totals[3].detach()
        return Losses(by_player, metrics)

    @torch.no_grad()
    def _draw_z_s(
        self, prediction: Prediction, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Draw x ~ Cat(p) where it will be looked at, then z_s ~ q(z_s | z_t, x)."""
        needed = self.process.rows_to_draw(z_t, s, t, draws)
        if self.config.auxiliary_target == "hard":
            needed = needed | self.process.rows_with_loss(z_t, t)
        index = needed.flatten().nonzero().squeeze(-1)
        uniform = draws.uniform("x", z_t.shape[1:]).flatten()
        x = z_t.clamp(max=self.process.vocab_size - 1).flatten()
        for rows, log_probs in prediction.chunks(index, self.config.chunk_rows or max(1, index.numel())):
            x[rows] = categorical_from_uniform(log_probs.exp(), uniform[rows])
        x = x.view_as(z_t)
        return x, self.process.posterior_sample(x, z_t, s, t, draws)

    def _row_losses(
        self,
        rows: Rows,
        turn: tuple[str, ...],
        x: Tensor,
        before: tuple[Tensor, Tensor],
        prediction: Prediction,
        teacher: Prediction,
        auxiliary: Prediction,
    ) -> Tensor:
        """Losses of both players, student entropy and teacher-auxiliary gap, ``[4, rows]``."""
        floor = math.log(self.config.probability_floor)
        with torch.set_grad_enabled("auxiliary" in turn):
            log_phi = auxiliary.log_probs(rows.index)
        with torch.no_grad():  # an exact teacher speaks float64, the networks float32
            log_theta = teacher.log_probs(rows.index).to(log_phi.dtype)
        with torch.set_grad_enabled("student" in turn):
            log_p = prediction.log_probs(rows.index)
            p = log_p.exp()
        losses_theta = self.process.candidate_losses(log_theta.clamp_min(floor), rows.z, rows.s)
        losses_phi = self.process.candidate_losses(log_phi.detach().clamp_min(floor), rows.z, rows.s)
        student = (p * (losses_theta - losses_phi)).sum(-1)
        target = self._auxiliary_target(rows, x, before, log_p.detach())
        auxiliary_loss = self.process.row_losses(target, log_phi, rows.z, rows.s)
        auxiliary_loss = auxiliary_loss + self.process.row_losses(log_theta.exp(), log_phi, rows.z, rows.s)
        with torch.no_grad():
            entropy = -torch.special.xlogy(p, p).sum(-1)
            gap = (log_theta.exp() - log_phi.exp()).abs().sum(-1) / 2
        return torch.stack((student, auxiliary_loss, entropy, gap))

    def _auxiliary_target(
        self, rows: Rows, x: Tensor, before: tuple[Tensor, Tensor], log_p: Tensor
    ) -> Tensor:
        """What the auxiliary learns of the student: int64 ``[rows]`` or probabilities ``[rows, vocab]``.

        All three have the mean E_student[x | z_s]: given z_s alone, given z_t and the latent for the masked process,
        or given z_t, the latent and z_s, ``p(x) q(z_s | z_t, x)`` normalised (Rao-Blackwell).
        """
        if self.config.auxiliary_target == "hard":
            return x.flatten()[rows.index]
        if self.config.auxiliary_target == "soft":
            return log_p.exp()
        z_t, t = before
        z_rows = z_t.flatten()[rows.index]
        t_rows = per_position(t, z_t).flatten()[rows.index]
        return self.process.clean_posterior(log_p, z_rows, rows.z, rows.s, t_rows).exp()
