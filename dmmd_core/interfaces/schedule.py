"""Noise schedule: the signal level over time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dmmd_core.interfaces.component import Component


class Schedule(Component, ABC):
    """Signal level ``alpha(t)``, falling from exactly 1 at t = 0 to exactly 0 at t = 1."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal level at times `t` in [0, 1]; any shape, the dtype of `t`, clamped to [0, 1]."""

    @abstractmethod
    def alpha_prime(self, t: Tensor) -> Tensor:
        """Derivative of the signal level with respect to time (not positive), the shape of `t`."""
