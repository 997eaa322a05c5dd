"""Objective: what is minimised, by whom, and in which turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from dmmd_core.draws import Draws
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.data import Batch


@dataclass(frozen=True)
class Player:
    """A module with its own optimiser.

    Attributes:
        module: What is trained.
        learning_rate_scale: Factor on the recipe's learning rate.
        result: Whether this is what the stage produces: it gets the moving average and is saved as the model.
    """

    module: nn.Module
    learning_rate_scale: float = 1.0
    result: bool = False


@dataclass
class Losses:
    """What one turn computed.

    Attributes:
        by_player: One scalar per player whose turn it is; their graphs share no trainable parameter.
        metrics: Detached scalars for log and progress bar.
    """

    by_player: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(Component, ABC):
    """A training game between one or more players.

    Assembly offers the constructor: ``process``; ``network``, the denoiser to train; ``teacher``, the frozen
    denoiser or None; ``copy_teacher``, a function that returns a new trainable denoiser with the weights that the
    network started from; ``num_steps``, the sampling steps a student is trained for, or None; ``training_steps``, the
    optimiser steps of the stage.
    """

    kind: ClassVar[str] = "objective"

    @abstractmethod
    def players(self) -> dict[str, Player]:
        """The modules that are trained, by name; exactly one has ``result`` set."""

    def frozen(self) -> dict[str, nn.Module]:
        """Modules that are only asked; the loop keeps them in evaluation mode without gradients."""
        return {}

    def checkpointed(self) -> dict[str, nn.Module]:
        """Those of `frozen` whose weights change all the same, such as a student that became the teacher.

        Checkpoints hold their weights beside the players'.
        """
        return {}

    def turn(self, step: int) -> tuple[str, ...]:
        """Names of the players that are updated in this step; all by default."""
        return tuple(self.players())

    @abstractmethod
    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """Compute the losses of the players whose turn it is, and metrics: means over the batch's examples.

        The loop may hand a batch over in parts, to one process or to several, and averages what it gets.

        Args:
            turn: Names from `turn`.
            batch: Training examples.
            draws: All randomness of this step.
        """

    def alarms(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """What in logged metrics tells that training goes wrong without failing, such as a student that collapses.

        Args:
            metrics: Scalars of a step, those of `Losses.metrics`.

        Returns:
            By name, one sentence each on what was seen and what to do. An alarm is raised when it appears, and again
            only after it has been gone.
        """
        return {}

    def after_update(self, step: int) -> None:
        """Called after the optimisers have stepped, for example to replace the teacher by its student."""

    def state(self) -> Mapping[str, Any]:
        """JSON-serialisable state beyond the players' weights, kept in checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state to load, got keys {sorted(state)}")
