"""Teacher training: the process loss of E[x | z_t] against the data, or against another teacher's mean."""

from __future__ import annotations

from collections.abc import Sequence
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
    option,
    rows_with_loss,
    sum_over_rows,
    times_per_position,
    times_per_sample,
    training_condition,
)


class Denoising(Objective):
    """``min E_t[ L_t(target, x_hat(z_t)) ]``, t uniform in (0, 1); with blocks, each has a t of its own."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        target: Literal["data", "teacher"] = option(
            "data", help="learn from clean tokens, or from the mean that a loaded teacher gives"
        )
        label_dropout: float = option(
            0.0, help="probability that an example's label is replaced by 'no label', for guidance", minimum=0, below=1
        )
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    def __init__(
        self,
        config: Denoising.Config,
        *,
        process: Process,
        network: Denoiser,
        teacher: Denoiser | None,
        num_classes: int | None = None,
    ) -> None:
        self.config = config
        self.process = process
        self.network = network
        self.teacher = teacher
        self.num_classes = num_classes

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """Learning from data makes a teacher, learning from a loaded one initialises; label dropout allows guidance."""
        found = {"blocks", "trains_teacher" if config.target == "data" else "initializes"}
        return frozenset({*found, "unlabelled"} if config.label_dropout > 0 else found)

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = []
        if config.target == "teacher":
            needs.append(Requirement("teacher", "loaded", "to learn from a teacher's outputs", "target"))
        if config.label_dropout > 0:
            needs.append(Requirement("backbone", "labels", "to drop labels", "label_dropout"))
            if config.target == "teacher":
                reason = "(training with label dropout) to be asked without a label"
                needs.append(Requirement("teacher", "unlabelled", reason, "label_dropout"))
        return needs

    def players(self) -> dict[str, Player]:
        """See `Objective.players`."""
        return {"network": Player(self.network, result=True)}

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        batch = self._drop_labels(batch, draws)
        t = times_per_position(self.network, draws.uniform("t", times_per_sample(self.network, batch)))
        z_t = self.process.corrupt(batch.tokens, t, draws)
        condition = training_condition(self.network, batch)
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

    def _drop_labels(self, batch: Batch, draws: Draws) -> Batch:
        """Replace each label by "no label" with a given probability (Ho and Salimans, arXiv:2207.12598)."""
        if not self.config.label_dropout or batch.labels is None:
            return batch
        assert self.num_classes is not None  # refused by `requires`
        dropped = draws.uniform("label_dropout") < self.config.label_dropout
        return Batch(batch.tokens, torch.where(dropped, self.num_classes, batch.labels))
