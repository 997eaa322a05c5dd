"""Backbone: the network proper, split into features and head so that logits are made only where needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Condition


class Backbone(nn.Module, Component, ABC):
    """Turns noisy tokens into features per position, and features into logits.

    Attributes:
        embedding_width: Width of the input embeddings, to which a generator may add its projected noise.
    """

    kind: ClassVar[str] = "backbone"
    embedding_width: int

    @abstractmethod
    def features(
        self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None
    ) -> Tensor:
        """Compute features.

        Args:
            z_t: Input ids, int64 ``[batch, length]``, below the process's ``num_inputs``.
            t: Times, ``[batch]`` or ``[batch, length]``.
            condition: Labels and context; what a backbone cannot use it refuses by a declared capability.
            input_noise: Added to the input embeddings, ``[batch, length, embedding_width]``.

        Returns:
            ``[batch, length, width]``.
        """

    @abstractmethod
    def head(self, features: Tensor) -> Tensor:
        """Map feature rows ``[rows, width]`` to logits over clean tokens ``[rows, vocab]``."""

    def description(self) -> dict[str, str]:
        """Choices made at construction that a log should tell, such as the attention kernel."""
        return {}
