"""Metric: judges samples; and the feature networks that some metrics look through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Denoiser
from dmmd_core.interfaces.process import Process
from dmmd_core.interfaces.sampler import Sampler


@dataclass(frozen=True)
class Subject:
    """What is judged.

    Attributes:
        model: ``teacher``, ``student``, or a yardstick such as ``reconstruction``.
        num_steps: Sampling steps; 0 for a yardstick.
        tokens: Samples, int64 ``[n, length]``, on the CPU.
        labels: The labels they were asked for, or None.
        denoiser: The model itself, None for a yardstick.
        sampler: What drew the samples, None for a yardstick.
        process: The noise process.
        draws: Randomness for metrics that sample further.
    """

    model: str
    num_steps: int
    tokens: Tensor
    labels: Tensor | None
    denoiser: Denoiser | None
    sampler: Sampler | None
    process: Process
    draws: Draws


@dataclass(frozen=True)
class Value:
    """One figure.

    Attributes:
        metric: Name of the figure; a metric may return several.
        value: The figure.
        standard_error: Its standard error, or None where it is not estimated.
        reference: What it was compared with, for example ``digits/test``; empty where nothing.
        num_samples: Number of samples it rests on; 0 for an exact figure.
        lower_is_better: Direction, or None where neither is better.
    """

    metric: str
    value: float
    standard_error: float | None = None
    reference: str = ""
    num_samples: int = 0
    lower_is_better: bool | None = True


class Metric(Component, ABC):
    """Computes figures for a subject."""

    kind: ClassVar[str] = "metric"

    def prepare(self) -> dict[str, float]:
        """Fit or load what the metric needs; returns facts worth reporting, such as a classifier's accuracy."""
        return {}

    @abstractmethod
    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """Judge one subject; may return nothing where it does not apply."""


class Features(Component, ABC):
    """A feature network: media to vectors, and where it can to classes."""

    kind: ClassVar[str] = "features"

    def prepare(self) -> dict[str, float]:
        """Fit or load; returns facts worth reporting."""
        return {}

    @abstractmethod
    def features(self, media: Tensor) -> Tensor:
        """Features of images uint8 ``[n, channels, height, width]``, float64 ``[n, width]``."""

    def classify(self, media: Tensor) -> Tensor:
        """Predicted classes, int64 ``[n]``; capability ``classes``."""
        raise NotImplementedError(f"{type(self).__name__} does not classify")

    @property
    def reference_name(self) -> str:
        """Name written beside every figure that was measured through these features."""
        return type(self).__name__
