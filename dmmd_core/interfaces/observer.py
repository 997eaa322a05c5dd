"""Observer: shows a run somewhere else while it goes on, in a dashboard for example."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.metric import Value


class Observer(Component, ABC):
    """Is told what happens in a run; a recipe switches it on (``observers``).

    It has no part in what the run computes, and a run may be resumed with other observers. It lives in the first
    process alone. Assembly offers the constructor: ``directory``, the run directory; ``name``, the run's name;
    ``recipe``, the recipe as plain containers with every default. The constructor writes nothing and opens nothing:
    `begin` does.

    A resumed run goes on from its newest checkpoint, so that steps, samples and figures that were told before may be
    told again, with the same values; the observer sees to it that nothing is shown twice.
    """

    kind: ClassVar[str] = "observer"

    def begin(self) -> None:
        """The run begins, or goes on; the run directory exists."""

    @abstractmethod
    def on_step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """A log line of a training stage.

        Args:
            stage: ``teacher``, ``initialize`` or ``distill``.
            step: Steps done in the stage, counted from 1; rises within one life of the observer.
            metrics: What the objective measured, and speed, shares of time and memory.
        """

    @abstractmethod
    def on_figures(self, model: str, num_steps: int, figures: Sequence[Value]) -> None:
        """A model has been judged.

        Args:
            model: ``teacher``, ``student``, or the yardsticks ``train`` and ``test`` (real data).
            num_steps: Sampling steps, rising for a model; 0 for a yardstick.
            figures: What the metrics found; values may be infinite or not a number.
        """

    def on_samples(self, model: str, num_steps: int, samples: Tensor | Sequence[str]) -> None:
        """Samples to look at, before they are judged.

        Args:
            model: As for `on_figures`.
            num_steps: As for `on_figures`.
            samples: Images, uint8 ``[n, channels, height, width]``, or texts; a few dozen at most.
        """

    def on_warning(self, stage: str, step: int, message: str) -> None:
        """Somebody should look: a step was skipped, a student seems to collapse."""

    def on_checkpoint(self, stage: str, step: int, path: Path) -> None:
        """A checkpoint is complete on disk."""

    def on_stage(self, stage: str, seconds: float) -> None:
        """A stage has finished, ``data`` and ``evaluate`` among them; it took so long over all resumes."""

    def end(self, error: BaseException | None) -> None:
        """The run ends; close everything.

        Args:
            error: What ended it early, or None.
        """
