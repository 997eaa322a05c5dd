"""Self-Distillation Through Time (Deschenaux and Gulcehre, arXiv:2410.21035, section 3, algorithm 1).

Several ancestral steps of the teacher become one of the student: at every position that is masked in z_t the student
learns the teacher's distribution at the step that unmasked it, and the last step's where it is still masked. In rounds
the student becomes the teacher, and the steps grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import (
    Batch,
    Condition,
    Draws,
    Losses,
    Prediction,
    Requirement,
    Rows,
    option,
    rows_with_loss,
    sum_over_rows,
    times_per_position,
    times_per_sample,
    training_condition,
)
from dmmd_objectives.divergences import Divergence, row_divergence
from dmmd_objectives.rounds import RoundsObjective
from dmmd_objectives.steps import ancestral_step


class SelfDistillation(RoundsObjective):
    """SDTT: ``min E[ divergence(student(z_t), teacher's distributions over its steps from t down to t - 1/K) ]``.

    K is `num_steps` in the last round and `teacher_steps` times as many in the round before. The student's output stays
    factorised: whatever randomness it is given, the target does not depend on it.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        divergence: Divergence = option(
            "reverse_kl", help="KL(student, teacher), KL(teacher, student) or half the L1 distance"
        )
        teacher_steps: int = option(2, help="steps of the teacher that become one of the student", minimum=1)
        rounds: int = option(3, help="rounds of equal length; after each the student becomes the teacher", minimum=1)
        round_average: float = option(
            0.0,
            help="decay of the moving average of weights that becomes the next teacher; 0 for the weights as they are",
            minimum=0,
            below=1,
        )
        times: Literal["uniform", "grid"] = option(
            "uniform", help="t ~ U(0, 1), or the times that a sampler of this round's steps visits"
        )
        probability_floor: float = option(1e-6, help="smallest teacher probability in reverse_kl", above=0, below=1)
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("process", "masks", "to learn each position at the step that unmasks it")]

    def student_steps(self) -> int:
        """The number of sampling steps that this round trains for, K."""
        return self.num_steps * self.config.teacher_steps**self.rounds.left

    def draw_times(self, draws: Draws, shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw t, and the end of the student's step ``s = max(0, t - 1/K)``; float64 ``[batch, *shape]`` each."""
        steps = self.student_steps()
        t = draws.uniform("t", shape)
        if self.config.times == "grid":
            t = (t * steps).ceil() / steps
        return (t - 1 / steps).clamp(min=0), t

    def teacher_times(self, s: Tensor, t: Tensor) -> list[Tensor]:
        """Times of the teacher's steps from t to s, ``t u + s (1 - u)`` for u = 1, 1 - 1/m, ..., 0."""
        count = self.config.teacher_steps
        parts = [1 - step / count for step in range(count + 1)]
        return [t * part + s * (1 - part) for part in parts]

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        times = self.draw_times(draws, times_per_sample(self.student, batch))
        s, t = (times_per_position(self.student, time) for time in times)
        z_t = self.process.corrupt(batch.tokens, t, draws)
        condition = training_condition(self.student, batch)
        unmasked_at, predictions = self.walk(z_t, s, t, condition, draws)
        prediction = self.student(z_t, t, condition, self.student.draw_latent(draws))

        def row_loss(rows: Rows, student: Prediction, *teachers: Prediction) -> Tensor:
            log_p = student.log_probs()
            log_target = self._targets(unmasked_at.flatten()[rows.index], teachers).to(log_p.dtype)
            return row_divergence(self.config.divergence, log_p, log_target, self.config.probability_floor)

        rows = rows_with_loss(self.process, z_t, t)
        loss = sum_over_rows(rows, row_loss, self.config.chunk_rows, (prediction, *predictions))
        metrics = {"student_loss": loss.detach(), "round": torch.tensor(float(self.rounds.round))}
        return Losses({"student": loss}, metrics)

    @torch.no_grad()
    def walk(
        self, z_t: Tensor, s: Tensor, t: Tensor, condition: Condition, draws: Draws
    ) -> tuple[Tensor, list[Prediction]]:
        """Let the teacher walk from t to s.

        Returns:
            The step that unmasked each position, the last one for those still masked, int64 ``[batch, length]``; and
            the teacher's prediction at each step.
        """
        teacher, times = self.rounds.teacher, self.teacher_times(s, t)
        last = self.config.teacher_steps - 1
        unmasked_at = torch.full_like(z_t, last)
        predictions = []
        for step in range(last + 1):
            now, then = times[step], times[step + 1]
            own = draws.within(f"teacher{step}")
            prediction = teacher(z_t, now, condition, teacher.draw_latent(own)).detached()
            predictions.append(prediction)
            if step < last:
                _, z_s = ancestral_step(
                    self.process, prediction, z_t, then, now, own, chunk_rows=self.config.chunk_rows
                )
                unmasked_at = torch.where(z_s != z_t, step, unmasked_at)
                z_t = z_s
        return unmasked_at, predictions

    def _targets(self, unmasked_at: Tensor, teachers: Sequence[Prediction]) -> Tensor:
        """Log-probabilities of the step that unmasked each row, ``[rows, vocab]``."""
        if len(teachers) == 1:
            return teachers[0].log_probs()
        found = None
        for step, teacher in enumerate(teachers):
            chosen = (unmasked_at == step).nonzero().squeeze(-1)
            log_probs = teacher.log_probs(chosen)
            if found is None:
                found = log_probs.new_empty(len(unmasked_at), log_probs.shape[-1])
            found[chosen] = log_probs
        assert found is not None
        return found
