"""The exact teacher: E[x | z_t] of an enumerable distribution by Bayes' rule over all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmmd_core import (
    Backbone,
    Condition,
    Denoiser,
    EnumerableData,
    Prediction,
    Process,
    Requirement,
    TablePrediction,
    Teacher,
    per_position,
)

# Weight of agreement at a position that is certain; exp(-_CERTAIN) is zero in float64, and a noisy sequence outside
# the support still gets the posterior of its nearest sequences instead of 0 / 0.
_CERTAIN = 2000.0


class ExactDenoiser(Denoiser):
    """E[x | z_t] by enumeration, in float64.

    With blocks, ``E[x^i | z_t^i, x^{<i}]``: the blocks before are known, those behind are not. The context of finished
    blocks is their tokens.

    Args:
        process: The noise process.
        sequences: All clean sequences, int64 ``[sequences, length]``.
        probabilities: Their probabilities, float64 ``[sequences]``.
        block_size: Tokens per block, or None.
    """

    def __init__(
        self, process: Process, sequences: Tensor, probabilities: Tensor, block_size: int | None = None
    ) -> None:
        super().__init__()
        self.process = process
        self.block_size = block_size
        possible = probabilities > 0
        one_hot = torch.nn.functional.one_hot(sequences[possible], process.vocab_size).double()
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.register_buffer("log_prior", probabilities[possible].log(), persistent=False)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`."""
        condition, times = condition or Condition(), per_position(t, z_t)
        if condition.clean is None:
            before = z_t[:, :0] if condition.context is None else condition.context.expand(len(z_t), -1)
            return TablePrediction(self._mean(before, z_t, times).log())
        size = self.block_size or z_t.shape[1]
        parts = [
            self._mean(condition.clean[:, :start], z_t[:, start : start + size], times[:, start : start + size])
            for start in range(0, z_t.shape[1], size)
        ]
        return TablePrediction(torch.cat(parts, dim=1).log())

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """See `Denoiser.encode`: the tokens of all finished blocks."""
        if self.block_size is None:
            return super().encode(tokens, condition)
        before = condition and condition.context
        return tokens if before is None else torch.cat((before, tokens), dim=1)

    def _mean(self, before: Tensor, z: Tensor, times: Tensor) -> Tensor:
        """Mean at the positions of `z`, which follow the clean tokens `before`, ``[batch, positions, vocab]``."""
        z_all = torch.cat((before, z), dim=1)
        times = torch.cat((torch.zeros_like(before, dtype=times.dtype), times), dim=1)
        evidence = self.process.evidence(z_all, times)
        evidence = torch.where(self.process.known(z_all, times), _CERTAIN, evidence)
        evidence = torch.where(z_all < self.process.vocab_size, evidence, 0.0)
        token = z_all.clamp(max=self.process.vocab_size - 1)
        table = torch.zeros(len(z), *self.one_hot.shape[1:], dtype=torch.float64, device=z.device)
        table[:, : z_all.shape[1]].scatter_(-1, token.unsqueeze(-1), evidence.unsqueeze(-1))
        weights = (self.log_prior + table.flatten(1) @ self.one_hot.flatten(1).T).softmax(-1)
        mean = (weights @ self.one_hot.flatten(1)).unflatten(-1, self.one_hot.shape[1:])
        return mean[:, before.shape[1] : z_all.shape[1]]


class Exact(Teacher):
    """The teacher that no training can better; its world must be enumerable."""

    def __init__(
        self, config: Exact.Config, *, process: Process, data: EnumerableData, backbone: Backbone | None = None
    ) -> None:
        self.config = config
        self.process = process
        self.data = data
        self.block_size = None if backbone is None else backbone.block_size

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"blocks"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "enumerable", "to sum over all sequences")]

    def denoiser(self) -> Denoiser:
        """See `Teacher.denoiser`."""
        return ExactDenoiser(self.process, self.data.sequences(), self.data.probabilities(), self.block_size)
