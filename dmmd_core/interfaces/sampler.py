"""Sampler: runs a denoiser from the prior to clean tokens in a number of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.errors import UnsupportedError
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Condition, Denoiser


@dataclass(frozen=True)
class Samples:
    """What a sampler made.

    Attributes:
        tokens: Clean tokens, int64 ``[batch, length]``.
        last_log_probs: The factorised log-probabilities of the last step, ``[batch, length, vocab]``, where asked
            for: averaged over samples they estimate the sampler's distribution with less noise than counting.
    """

    tokens: Tensor
    last_log_probs: Tensor | None = None


class Sampler(Component, ABC):
    """Draws clean tokens from a denoiser.

    Capabilities: ``last_step`` if it can return `last_log_probs`; ``distribution`` if it can enumerate; ``blocks`` if
    it goes from block to block of a denoiser that has a `Denoiser.block_size`; ``guides`` if it is set to guide by
    labels, which is for teachers alone.
    """

    kind: ClassVar[str] = "sampler"

    @abstractmethod
    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
        length: int | None = None,
    ) -> Samples:
        """Draw one batch.

        Args:
            denoiser: Teacher or student, on the device of `draws`.
            draws: One sample per index; its `step` is replaced by the sampler's own.
            num_steps: Number of steps, at least 1; with blocks, for each of them. Each is at most one network call.
            condition: Labels, fixed positions, and the context of a block.
            last_step: Also return the last step's log-probabilities.
            length: Tokens to draw; by default those of the data.
        """

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """The denoiser that `sample` asks: guided, where the sampler is set to guide.

        Whoever encodes finished blocks for this sampler asks the same one, whose context then fits. What is prepared
        already comes back as it is.
        """
        return denoiser

    def step_times(self, left: Tensor) -> Tensor:
        """Where on the way from t = 1 to 0 the steps lie.

        Of k steps, step i goes from ``step_times(1 - i / k)`` to ``step_times(1 - (i + 1) / k)``. This
        function is offered to objectives, which may practise the sampler's steps.

        Args:
            left: Share of the steps still to be taken, in [0, 1], any shape.

        Returns:
            Times, increasing in `left`, exactly 0 at 0 and 1 at 1; by default `left` itself, steps of one length.
        """
        return left

    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> Tensor:
        """Exact distribution of the result over all sequences, float64 ``[vocab ** length]``.

        Only for denoisers without latent in worlds small enough to enumerate; sequences are numbered with the
        first position as the most significant digit.

        Args:
            denoiser: Teacher or student.
            num_steps: As for `sample`.
            context: Context of a block, of one sample.
            length: As for `sample`.

        Raises:
            UnsupportedError: This sampler cannot enumerate.
        """
        raise UnsupportedError(f"{type(self).__name__} cannot enumerate its distribution; count samples instead")
