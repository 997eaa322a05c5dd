"""Discrete Moment Matching Distillation (arXiv:2603.20155, algorithm 1).

``min_student max_auxiliary E[ L_s(x, teacher) - L_s(x, auxiliary) - L_s(teacher, auxiliary) ]``: the auxiliary
learns the average of the teacher and of the student's own E[x | z_s]; the student moves to where both agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    option,
    per_position,
    rows_with_loss,
    sum_over_rows,
    times_per_position,
    times_per_sample,
    training_condition,
)
from dmmd_objectives.steps import ancestral_step

_NEAR = 0.1  # of alarm_gap: where the auxiliary is so near the teacher, the student has not collapsed


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
            help="t = s + delta with delta ~ U(0, 1/k), as in algorithm 1, or the next of the sampler's k times",
        )
        auxiliary_target: Literal["hard", "soft", "posterior"] = option(
            "hard",
            help="auxiliary learns from the drawn tokens, from the student's probabilities (masked only), or from "
            "those given z_s as well (any process, least noise)",
        )
        auxiliary_learning_rate_scale: float = option(
            1.0, help="auxiliary's learning rate as a multiple of the student's", above=0
        )
        guidance: float = option(
            1.0, help="classifier-free guidance of the teacher, absorbed by the student; 1 is none", minimum=0
        )
        temperature: float = option(1.0, help="temperature of the teacher, absorbed by the student", above=0)
        top_p: float = option(1.0, help="nucleus of the teacher, absorbed by the student", above=0, maximum=1)
        top_p_lowering: float = option(2.0, help="nats taken off tokens outside the nucleus", above=0)
        probability_floor: float = option(
            1e-6, help="smallest teacher and auxiliary probability in the student's loss", above=0, below=1
        )
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)
        alarm_gap: float = option(
            0.25,
            help="mean distance (total variation) between teacher and auxiliary that raises an alarm; 1 for none",
            above=0,
            maximum=1,
        )
        alarm_entropy: float = option(
            1e-3,
            help="student entropy, in nats per token, that raises an alarm unless the auxiliary is near the teacher; 0 "
            "for none",
            minimum=0,
        )

    def __init__(
        self,
        config: MomentMatching.Config,
        *,
        process: Process,
        network: Denoiser,
        teacher: Denoiser,
        copy_teacher: Callable[[], Denoiser],
        num_steps: int,
        num_classes: int | None = None,
        step_times: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.config = config
        self.process = process
        self.student = network
        self.auxiliary = copy_teacher()
        self.num_steps = num_steps
        self.step_times = step_times or (lambda left: left)
        shaped = config.guidance != 1.0 or config.temperature != 1.0 or config.top_p != 1.0
        self.teacher = (
            ShapedDenoiser(
                teacher,
                guidance=config.guidance,
                num_classes=num_classes,
                temperature=config.temperature,
                top_p=config.top_p,
                lowering=config.top_p_lowering,
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
        needs = []
        if config.auxiliary_target == "soft":
            reason = "a soft target is exact only where z_s tells nothing about the position's token"
            needs.append(Requirement("process", "soft_targets", reason, "auxiliary_target"))
        if config.guidance != 1.0:
            needs.append(Requirement("backbone", "labels", "to absorb guidance by labels", "guidance"))
            reason = "(training with label dropout) to be guided"
            needs.append(Requirement("teacher", "unlabelled", reason, "guidance"))
        return needs

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

    def alarms(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """See `Objective.alarms`.

        A student that lays all its mass on single tokens may be right (one step from input noise to a sample), so that
        a low entropy alone is none: the auxiliary, which learns what it draws, must differ from the teacher too.
        """
        entropy, gap = metrics["student_entropy"], metrics["teacher_auxiliary_gap"]
        found = {}
        if gap > self.config.alarm_gap < 1:
            found["gap"] = (
                f"the auxiliary is far from the teacher (mean distance {gap:.3g}, alarm_gap "
                f"{self.config.alarm_gap:g}); the student may be drifting away: look at its samples, lower the "
                "learning rate"
            )
        if entropy < self.config.alarm_entropy and gap > _NEAR * self.config.alarm_gap:
            found["entropy"] = (
                f"the student's entropy is {entropy:.3g} nats per token (alarm_entropy {self.config.alarm_entropy:g}) "
                f"and the auxiliary {gap:.3g} from the teacher; the student may have collapsed: look at its samples, "
                "lower the learning rate or go back to an earlier checkpoint"
            )
        return found

    def draw_times(self, draws: Draws, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw s and the t it comes from; float64 ``[batch, *shape]`` each.

        ``interval``: s ~ U(0, 1), t = min(1, s + delta), delta ~ U(0, 1/k) (algorithm 1). ``grid``: s = g(u) with
        u ~ U(0, 1) and t = g(ceil(k u) / k), the time from which the sampler's k steps cross s, where g is its
        `step_times`: the student practises the steps it will take and no others.
        """
        s = draws.uniform("s", shape)
        if self.config.times == "grid":
            return self.step_times(s), self.step_times((s * self.num_steps).ceil() / self.num_steps)
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
            lambda rows, *predictions: self._row_losses(rows, turn, x, (z_t, t), *predictions),  # 3
            self.config.chunk_rows,
            (
                prediction if "student" in turn else prediction.detached(),
                teacher.detached(),
                auxiliary if "auxiliary" in turn else auxiliary.detached(),
            ),
        )
        by_player = dict(zip(turn, totals, strict=False))
        metrics = {f"{name}_loss": value.detach() for name, value in by_player.items()}
        metrics["student_entropy"] = totals[-2].detach()
        metrics["teacher_auxiliary_gap"] = totals[-1].detach()
        return Losses(by_player, metrics)

    def _draw_z_s(
        self, prediction: Prediction, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """Draw x ~ Cat(p), then z_s ~ q(z_s | z_t, x)."""
        hard = self.config.auxiliary_target == "hard"
        wanted = self.process.rows_with_loss(z_t, t) if hard else None
        return ancestral_step(
            self.process, prediction, z_t, s, t, draws, wanted=wanted, chunk_rows=self.config.chunk_rows
        )

    def _row_losses(
        self,
        rows: Rows,
        turn: tuple[str, ...],
        x: Tensor,
        before: tuple[Tensor, Tensor],
        student: Prediction,
        teacher: Prediction,
        auxiliary: Prediction,
    ) -> list[Tensor]:
        """Losses of the players in `turn`, student entropy and teacher-auxiliary gap, ``[rows]`` each."""
        # Every tensor here is one of [rows, vocab]: none outlives its last use.
        log_theta = teacher.log_probs()
        log_phi = auxiliary.log_probs()
        log_theta = log_theta.to(log_phi.dtype)  # an exact teacher speaks float64, the networks float32
        with torch.no_grad():
            theta = log_theta.exp()
            gap = (log_phi.exp() - theta).abs_().sum(-1) / 2
        if "auxiliary" not in turn:
            del theta
        difference = self._difference(rows, log_theta, log_phi.detach()) if "student" in turn else None
        del log_theta
        if "auxiliary" not in turn:
            del log_phi
        log_p = student.log_probs()
        p = log_p.exp()
        if "auxiliary" not in turn:
            del log_p
        losses = {}
        if difference is not None:
            losses["student"] = (p * difference).sum(-1)
        with torch.no_grad():
            entropy = torch.special.xlogy(p, p).sum(-1).neg_()
        if "auxiliary" in turn:
            target = self._add_students_part(theta, rows, x, before, log_p.detach(), p.detach())
            losses["auxiliary"] = self.process.row_losses(target, log_phi, rows.z, rows.s)
        return [*(losses[name] for name in turn), entropy, gap]

    def _difference(self, rows: Rows, log_theta: Tensor, log_phi: Tensor) -> Tensor:
        """Teacher's loss less auxiliary's for every candidate token, ``[rows, vocab]``."""
        floor = math.log(self.config.probability_floor)

        def candidates(log_probs: Tensor) -> Tensor:
            return self.process.candidate_losses(log_probs.clamp_min(floor), rows.z, rows.s)

        return candidates(log_theta) - candidates(log_phi)

    def _add_students_part(
        self, theta: Tensor, rows: Rows, x: Tensor, before: tuple[Tensor, Tensor], log_p: Tensor, p: Tensor
    ) -> Tensor:
        """Add to the teacher's probabilities ``[rows, vocab]``, in place, what the auxiliary learns of the student.

        All three have the mean E_student[x | z_s]: given z_s alone (the drawn tokens), given z_t and the latent for the
        masked process, or given z_t, the latent and z_s, ``p(x) q(z_s | z_t, x)`` normalised (Rao-Blackwell). A loss is
        linear in its target, so that the sum of both targets needs one pass.
        """
        if self.config.auxiliary_target == "hard":
            drawn = x.flatten()[rows.index].unsqueeze(-1)
            return theta.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=theta.dtype))
        if self.config.auxiliary_target == "soft":
            return theta.add_(p)
        z_t, t = before
        z_rows = z_t.flatten()[rows.index]
        t_rows = per_position(t, z_t).flatten()[rows.index]
        return theta.add_(self.process.clean_posterior(log_p, z_rows, rows.z, rows.s, t_rows).exp_())
