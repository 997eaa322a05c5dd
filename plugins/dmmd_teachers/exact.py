"""The exact teacher: E[x | z_t] of an enumerable distribution by Bayes' rule over all sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dmmd_core import (
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

    Args:
        process: The noise process.
        sequences: All clean sequences, int64 ``[sequences, length]``.
        probabilities: Their probabilities, float64 ``[sequences]``.
    """

    def __init__(self, process: Process, sequences: Tensor, probabilities: Tensor) -> None:
        super().__init__()
        self.process = process
        possible = probabilities > 0
        one_hot = torch.nn.functional.one_hot(sequences[possible], process.vocab_size).double()
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.register_buffer("log_prior", probabilities[possible].log(), persistent=False)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`."""
        times = per_position(t, z_t)
        evidence = self.process.evidence(z_t, times)
        evidence = torch.where(self.process.known(z_t, times), _CERTAIN, evidence)
        evidence = torch.where(z_t < self.process.vocab_size, evidence, 0.0)
        token = z_t.clamp(max=self.process.vocab_size - 1)
        table = torch.zeros(*z_t.shape, self.process.vocab_size, dtype=torch.float64, device=z_t.device)
        table.scatter_(-1, token.unsqueeze(-1), evidence.unsqueeze(-1))
        weights = (self.log_prior + table.flatten(1) @ self.one_hot.flatten(1).T).softmax(-1)
        mean = (weights @ self.one_hot.flatten(1)).unflatten(-1, self.one_hot.shape[1:])
        return TablePrediction(mean.log())


class Exact(Teacher):
    """The teacher that no training can better; its world must be enumerable."""

    def __init__(self, config: Exact.Config, *, process: Process, data: EnumerableData) -> None:
        self.config = config
        self.process = process
        self.data = data

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "enumerable", "to sum over all sequences")]

    def denoiser(self) -> Denoiser:
        """See `Teacher.denoiser`."""
        return ExactDenoiser(self.process, self.data.sequences(), self.data.probabilities())
