"""Teacher training: the process loss of E[x | z_t] against the data, or against another teacher's mean."""

from __future__ import annotations

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
    Prediction,
    Process,
    Requirement,
    Rows,
    option,
    rows_with_loss,
    sum_over_rows,
)


class Denoising(Objective):
    """``min E_t[ L_t(target, x_hat(z_t)) ]``, t uniform in (0, 1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        target: Literal["data", "teacher"] = option(
            "data", help="learn from clean tokens, or from the mean that a loaded teacher gives"
        )
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    def __init__(
        self, config: Denoising.Config, *, process: Process, network: Denoiser, teacher: Denoiser | None
    ) -> None:
        self.config = config
        self.process = process
        self.network = network
        self.teacher = teacher

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """Learning from data makes a teacher; learning from a loaded teacher initialises the networks."""
        return frozenset({"trains_teacher"} if config.target == "data" else {"initializes"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        if config.target == "teacher":
            return [Requirement("teacher", "loaded", "to learn from a teacher's outputs", "target")]
        return []

    def players(self) -> dict[str, Player]:
        """See `Objective.players`."""
        return {"network": Player(self.network, result=True)}

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        t = draws.uniform("t")
        z_t = self.process.corrupt(batch.tokens, t, draws)
        condition = Condition(label=batch.labels)
        prediction = self.network(z_t, t, condition, self.network.draw_latent(draws))
        clean = batch.tokens.flatten()
        predictions = [prediction]
        if self.config.target == "teacher":
            assert self.teacher is not None  # refused by `requires`
            with torch.no_grad():
                predictions.append(self.teacher(z_t, t, condition).detached())

        def row_loss(rows: Rows, network: Prediction, teacher: Prediction | None = None) -> Tensor:
            target = clean[rows.index] if teacher is None else teacher.log_probs().exp()
            log_probs = network.log_probs()
            if teacher is not None:
                target = target.to(log_probs.dtype)
            return self.process.row_losses(target, log_probs, rows.z, rows.s)

        rows = rows_with_loss(self.process, z_t, t)
        loss = sum_over_rows(rows, row_loss, self.config.chunk_rows, predictions)
        return Losses({"network": loss}, {"loss": loss.detach()})
