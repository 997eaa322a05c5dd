"""Discrete consistency distillation (Duo; Sahoo et al., arXiv:2506.10892, section 4).

The student at z_t learns the teacher's distribution at z_s, ``s = t - 1/K``, on one deterministic trajectory. Duo draws
the trajectory in a Gaussian space: ``z_t = argmax(a_t x + b_t noise)`` with the same noise at all times. Projected on
tokens it is short to say: a position keeps its clean token up to a random time and then shows one other token for good.
That is `Process.corrupt` at both times with the same draws; the joint law of (z_s, z_t) is the same, without a Gaussian
for every token and without its table of signal levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dmmd_core import (
    Batch,
    Draws,
    Losses,
    Prediction,
    Rows,
    option,
    rows_with_loss,
    sum_over_rows,
    times_per_position,
    times_per_sample,
    training_condition,
)
from dmmd_objectives.divergences import row_divergence
from dmmd_objectives.rounds import RoundsObjective


class ConsistencyDistillation(RoundsObjective):
    """DCD: ``min E[ KL(teacher(z_s), student(z_t)) ]`` with common noise; in rounds K halves and the student teaches.

    Written for uniform noise; the trajectory exists for every process.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        divergence: Literal["forward_kl", "reverse_kl"] = option(
            "forward_kl", help="KL(teacher, student), or KL(student, teacher), which with long steps misses the mean"
        )
        rounds: int = option(
            3, help="rounds of equal length; after each the student becomes the teacher and the steps double", minimum=1
        )
        round_average: float = option(
            0.99,
            help="decay of the moving average of weights that becomes the next teacher; 0 for the weights as they are",
            minimum=0,
            below=1,
        )
        probability_floor: float = option(1e-6, help="smallest teacher probability in reverse_kl", above=0, below=1)
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    def draw_times(self, draws: Draws, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw ``t = min(1, u + 1/K)`` with ``u ~ U(0, 1)``, and ``s = t - 1/K``; float64 ``[batch, *shape]`` each."""
        step = 1 / (self.num_steps * 2**self.rounds.left)
        t = (draws.uniform("t", shape) + step).clamp(max=1)
        return (t - step).clamp(min=0), t

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        times = self.draw_times(draws, times_per_sample(self.student, batch))
        s, t = (times_per_position(self.student, time) for time in times)
        z_s, z_t = (self.process.corrupt(batch.tokens, time, draws) for time in (s, t))  # the same noise at both times
        condition = training_condition(self.student, batch)
        teacher = self.rounds.teacher
        with torch.no_grad():
            target = teacher(z_s, s, condition, teacher.draw_latent(draws.within("teacher"))).detached()
        student = self.student(z_t, t, condition, self.student.draw_latent(draws))

        def row_loss(rows: Rows, student: Prediction, teacher: Prediction) -> Tensor:
            log_p = student.log_probs()
            log_target = teacher.log_probs().to(log_p.dtype)
            return row_divergence(self.config.divergence, log_p, log_target, self.config.probability_floor)

        rows = rows_with_loss(self.process, z_t, t)
        loss = sum_over_rows(rows, row_loss, self.config.chunk_rows, (student, target))
        metrics = {"student_loss": loss.detach(), "round": torch.tensor(float(self.rounds.round))}
        return Losses({"student": loss}, metrics)
