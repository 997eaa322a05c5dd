"""Objective two_steps: the student does in one step what its teacher does in two.

One round of self-distillation through time (SDTT; Deschenaux and Gulcehre, arXiv:2410.21035) with cross-entropy as
the distance; teacher and student may be any networks, the process any process.
"""

from __future__ import annotations

from typing import Any

import torch

from dmmd_core import (
    Batch,
    Denoiser,
    Draws,
    Losses,
    Objective,
    Player,
    PluginRegistrar,
    Process,
    hookimpl,
    rows_with_loss,
    sum_over_rows,
    training_condition,
)


class TwoSteps(Objective):
    """``min E[ L_t(theta(z_s), student(z_t)) ]``, where the teacher theta draws z_s from z_t half a step earlier."""

    def __init__(self, config: Any, *, process: Process, network: Denoiser, teacher: Denoiser, num_steps: int) -> None:
        self.process, self.student, self.teacher, self.num_steps = process, network, teacher, num_steps

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """It is for distillation."""
        return frozenset({"distills"})

    def players(self) -> dict[str, Player]:
        """One network is trained, and it is what comes out."""
        return {"student": Player(self.student, result=True)}

    def frozen(self) -> dict[str, torch.nn.Module]:
        """The teacher is only asked."""
        return {"teacher": self.teacher}

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """Cross-entropy of the student at z_t against the teacher at z_s, a mean over all positions."""
        t = draws.uniform("t")
        s = (t - 0.5 / self.num_steps).clamp(min=0)
        z_t, condition = self.process.corrupt(batch.tokens, t, draws), training_condition(self.student, batch)
        with torch.no_grad():
            mean = self.teacher(z_t, t, condition).log_probs().exp().view(*z_t.shape, -1)
            z_s = self.process.posterior_sample(draws.categorical("x", mean), z_t, s, t, draws)
            target = self.teacher(z_s, s, condition).log_probs().exp().float()
        prediction = self.student(z_t, t, condition, self.student.draw_latent(draws))
        loss = sum_over_rows(
            rows_with_loss(self.process, z_t, t),
            lambda rows, student: self.process.row_losses(target[rows.index], student.log_probs(), rows.z, rows.s),
            chunk_rows=0,
            predictions=[prediction],
        )
        return Losses({"student": loss}, {"loss": loss.detach()})


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the objective."""
    registry.add("objective", "two_steps", TwoSteps)
