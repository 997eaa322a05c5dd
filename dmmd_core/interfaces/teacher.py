"""Teacher: a denoiser that is loaded rather than trained in the run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Denoiser


class Teacher(Component, ABC):
    """Supplies a ready denoiser.

    Capabilities: ``weights`` if it is a `NetworkDenoiser` on the recipe's backbone; ``unlabelled`` if it has learned
    what the label ``num_classes``, "no label", means, so that it can be guided.
    """

    kind: ClassVar[str] = "teacher"

    @abstractmethod
    def denoiser(self) -> Denoiser:
        """Load or compute the teacher; called once, after the data is prepared."""
