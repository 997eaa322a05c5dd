"""Language model: the reference through which some metrics of text look; never the generator itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from dmmd_core.interfaces.component import Component


class LanguageModel(Component, ABC):
    """A causal model that scores the data's tokens.

    Attributes:
        module: The network, whose parameters' gradients a metric may take; there once `prepare` has run.
    """

    kind: ClassVar[str] = "language_model"
    module: nn.Module

    @abstractmethod
    def prepare(self) -> dict[str, float]:
        """Load or fit; called once before `losses`. Returns facts worth reporting."""

    @abstractmethod
    def losses(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Score sequences of the data's tokens, int64 ``[n, length]``.

        Returns:
            Negative log-likelihood in nats, summed over each sequence, ``[n]``, differentiable in the parameters of
            `module`; and the number of tokens that each sum is over, ``[n]``.
        """

    @property
    @abstractmethod
    def reference_name(self) -> str:
        """Name written beside every figure: which model, how trained, and in which precision."""
