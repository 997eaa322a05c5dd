"""Rounds of distillation: at the end of each the student becomes the teacher of the next."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dmmd_core import Denoiser, FieldError, Objective, Player, Process


class Rounds:
    """Whose predictions are the targets now.

    The stage is cut into rounds of equal length. In the first the given teacher is asked, in each later one the student
    as the round before left it, or the moving average of its weights.

    Args:
        student: The network that is trained.
        teacher: The given teacher.
        rounds: Number of rounds.
        training_steps: Optimiser steps of the whole stage.
        average: Decay of the moving average that becomes the teacher; 0 for the student's weights as they are.

    Raises:
        FieldError: There are more rounds than steps.
    """

    def __init__(
        self, student: Denoiser, teacher: Denoiser, *, rounds: int, training_steps: int, average: float
    ) -> None:
        if rounds > training_steps:
            raise FieldError("rounds", f"must be at most the stage's steps, which are {training_steps}, got {rounds}")
        self.student = student
        self.given = teacher
        self.count = rounds
        self.training_steps = training_steps
        self.average = average
        self.round = 0
        several = rounds > 1
        self._former = copy.deepcopy(student) if several else None
        self._mean = copy.deepcopy(student) if several and average else None

    @property
    def teacher(self) -> Denoiser:
        """The teacher of this round."""
        if self.round == 0:
            return self.given
        assert self._former is not None
        return self._former

    @property
    def left(self) -> int:
        """Rounds that follow this one."""
        return self.count - 1 - self.round

    def changing(self) -> dict[str, nn.Module]:
        """See `Objective.checkpointed`."""
        modules = {"former_student": self._former, "student_average": self._mean}
        return {name: module for name, module in modules.items() if module is not None}

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return {"teacher": self.given, **self.changing()}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """See `Objective.after_update`: follow the student, and begin the next round where it is time."""
        if self._mean is not None:
            pairs = zip(self._mean.parameters(), self.student.parameters(), strict=True)
            for mean, now in pairs:
                mean.lerp_(now, 1 - self.average)
        while self.left and (step + 1) * self.count >= self.training_steps * (self.round + 1):
            assert self._former is not None
            self._former.load_state_dict((self._mean or self.student).state_dict())
            self.round += 1

    def state(self) -> Mapping[str, Any]:
        """See `Objective.state`."""
        return {"round": self.round}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Objective.load_state`."""
        self.round = int(state["round"])


class RoundsObjective(Objective):
    """An objective whose only player is the student, and whose teacher changes with the `Rounds`.

    Its Config has ``rounds`` and ``round_average``.
    """

    def __init__(
        self,
        config: Any,
        *,
        process: Process,
        network: Denoiser,
        teacher: Denoiser,
        num_steps: int,
        training_steps: int,
    ) -> None:
        self.config = config
        self.process = process
        self.student = network
        self.num_steps = num_steps
        self.rounds = Rounds(
            network, teacher, rounds=config.rounds, training_steps=training_steps, average=config.round_average
        )

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"blocks", "distills"})

    def players(self) -> dict[str, Player]:
        """See `Objective.players`."""
        return {"student": Player(self.student, result=True)}

    def frozen(self) -> dict[str, nn.Module]:
        """See `Objective.frozen`."""
        return self.rounds.frozen()

    def checkpointed(self) -> dict[str, nn.Module]:
        """See `Objective.checkpointed`."""
        return self.rounds.changing()

    def after_update(self, step: int) -> None:
        """See `Objective.after_update`."""
        self.rounds.after_update(step)

    def state(self) -> Mapping[str, Any]:
        """See `Objective.state`."""
        return self.rounds.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `Objective.load_state`."""
        self.rounds.load_state(state)
