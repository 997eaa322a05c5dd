"""The game that `dimo` and `idlm` share: an auxiliary learns to denoise the student's samples, and nothing else.

Its optimum is the student's own E[x | z_s]; the auxiliary of D-MMD learns the average of that and of the teacher.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

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
    training_condition,
)
from dmmd_objectives.steps import draw_tokens


class FakeGame(Objective):
    """Samples of the student are noised again at ``s ~ U(0, 1)``, whatever time they come from.

    A method says where the student starts (`start`) and what its loss is on a row (`student_losses`).
    """

    hard_target: ClassVar[bool]
    """Whether the auxiliary learns the drawn tokens, or the probabilities they were drawn from."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        turns: Literal["alternate", "joint"] = option(
            "alternate", help="student and auxiliary in turn, or both on one draw"
        )
        auxiliary_turns: int = option(1, help="turns of the auxiliary for each of the student's", minimum=1)
        auxiliary_learning_rate_scale: float = option(
            1.0, help="auxiliary's learning rate as a multiple of the student's", above=0
        )
        probability_floor: float = option(
            1e-6, help="smallest teacher and auxiliary probability in the student's loss", above=0, below=1
        )
        chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)

    def __init__(
        self,
        config: FakeGame.Config,
        *,
        process: Process,
        network: Denoiser,
        teacher: Denoiser,
        copy_teacher: Callable[[], Denoiser],
        length: int,
    ) -> None:
        self.config = config
        self.process = process
        self.student = network
        self.teacher = teacher
        self.auxiliary = copy_teacher()
        self.length = length
        self.floor = math.log(config.probability_floor)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"distills"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("process", "masks", "since its losses stand at masked positions")]

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
        """See `Objective.turn`; the auxiliary begins."""
        others = self.config.auxiliary_turns
        students = step % (others + 1) == others
        if self.config.turns == "joint":
            return ("student", "auxiliary") if students or others == 1 else ("auxiliary",)
        return ("student",) if students else ("auxiliary",)

    @abstractmethod
    def start(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """Noisy tokens that the student begins with, int64 ``[batch, length]``, and their times ``[batch]``."""

    @abstractmethod
    def student_losses(self, log_p: Tensor, log_theta: Tensor, log_phi: Tensor) -> Tensor:
        """The student's losses, ``[rows]``.

        Args:
            log_p: Student's log-probabilities, with a graph, ``[rows, vocab]``.
            log_theta: Teacher's.
            log_phi: Auxiliary's, without a graph.
        """

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        z_t, t = self.start(batch, draws)
        condition = training_condition(self.student, batch)
        with torch.set_grad_enabled("student" in turn):
            student = self.student(z_t, t, condition, self.student.draw_latent(draws))
        unknown = ~self.process.known(z_t, t)
        x = draw_tokens(self.process, student, z_t, unknown, draws, chunk_rows=self.config.chunk_rows)
        s = draws.uniform("s")
        z_s = self.process.corrupt(x, s, draws.within("again"))
        with torch.set_grad_enabled("auxiliary" in turn):
            auxiliary = self.auxiliary(z_s, s, condition)
        predictions = [
            student if "student" in turn else student.detached(),
            auxiliary if "auxiliary" in turn else auxiliary.detached(),
        ]
        if "student" in turn:
            with torch.no_grad():
                predictions.append(self.teacher(z_s, s, condition).detached())
        totals = sum_over_rows(
            rows_with_loss(self.process, z_s, s),
            lambda rows, *parts: self._row_losses(rows, turn, x, *parts),
            self.config.chunk_rows,
            predictions,
        )
        by_player = dict(zip(turn, totals, strict=False))
        metrics = {f"{name}_loss": value.detach() for name, value in by_player.items()}
        metrics["student_entropy"] = totals[-1].detach()
        return Losses(by_player, metrics)

    def _row_losses(
        self,
        rows: Rows,
        turn: tuple[str, ...],
        x: Tensor,
        student: Prediction,
        auxiliary: Prediction,
        teacher: Prediction | None = None,
    ) -> list[Tensor]:
        """Losses of the players in `turn` and the student's entropy, ``[rows]`` each."""
        log_phi, log_p = auxiliary.log_probs(), student.log_probs()
        with torch.no_grad():
            p = log_p.exp()
            entropy = torch.special.xlogy(p, p).sum(-1).neg_()
        losses = {}
        if teacher is not None:
            log_theta = teacher.log_probs().to(log_phi.dtype)
            losses["student"] = self.student_losses(log_p, log_theta, log_phi.detach())
        if "auxiliary" in turn:
            target = x.flatten()[rows.index] if self.hard_target else p
            losses["auxiliary"] = self.process.row_losses(target, log_phi, rows.z, rows.s)
        return [*(losses[name] for name in turn), entropy]
