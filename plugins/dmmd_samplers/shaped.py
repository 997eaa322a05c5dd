"""What samplers of whole sequences share: how predictions are shaped, fixed tokens, and the last step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core import (
    Condition,
    Denoiser,
    Prediction,
    Process,
    Requirement,
    Sampler,
    guided,
    option,
    shape_log_probs,
)

_LOGITS_ALIVE = 2**27


@dataclass(frozen=True, kw_only=True)
class ShapedConfig:
    """Guidance, temperature and top-p, in this order; and how many logits are alive at a time."""

    chunk_rows: int = option(
        0, help="rows of logits alive at a time; 0 for as many as make 2^27 logits (half a GiB in float32)", minimum=0
    )
    guidance: float = option(1.0, help="classifier-free guidance of a teacher's predictions; 1 is none", minimum=0)
    temperature: float = option(1.0, help="temperature of every prediction", above=0)
    top_p: float = option(1.0, help="nucleus of every prediction", above=0, maximum=1)
    top_p_lowering: float | None = option(
        None, help="nats taken off tokens outside the nucleus; null removes them", above=0
    )

    def shape(self, log_probs: Tensor) -> Tensor:
        """Apply temperature and top-p to log-probabilities ``[rows, vocab]``; guidance is a matter of the denoiser."""
        lowering = math.inf if self.top_p_lowering is None else self.top_p_lowering
        return shape_log_probs(log_probs, self.temperature, self.top_p, lowering)

    def requirements(self) -> list[Requirement]:
        """What guidance needs of other roles."""
        if self.guidance == 1.0:
            return []
        return [
            Requirement("backbone", "labels", "to guide by labels", "guidance"),
            Requirement("teacher", "unlabelled", "(training with label dropout) to be guided", "guidance"),
        ]


class ShapedSampler(Sampler):
    """A sampler whose predictions are guided and shaped as its Config says.

    Args:
        config: A `ShapedConfig`.
        process: The noise process.
        length: Tokens of a whole sequence.
        num_classes: Number of classes, for guidance.
    """

    def __init__(self, config: ShapedConfig, *, process: Process, length: int, num_classes: int | None = None) -> None:
        self.config = config
        self.process = process
        self.length = length
        self.num_classes = num_classes

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """See `Sampler.prepared`."""
        return guided(denoiser, self.config.guidance, self.num_classes)

    @property
    def chunk_rows(self) -> int:
        """Rows of logits alive at a time, at least 1."""
        return self.config.chunk_rows or max(1, _LOGITS_ALIVE // self.process.vocab_size)

    def _last_log_probs(self, prediction: Prediction, z: Tensor, drawn: Tensor) -> Tensor:
        """Shaped log-probabilities ``[batch, length, vocab]`` where a token is `drawn`; elsewhere `z` is certain."""
        last = self.config.shape(prediction.log_probs()).unflatten(0, z.shape)
        # What is not drawn stays as it is, whatever the denoiser says of it.
        kept = torch.nn.functional.one_hot(z.clamp(max=last.shape[-1] - 1), last.shape[-1]).to(last).log()
        return torch.where(drawn.unsqueeze(-1), last, kept)


def fix_tokens(z: Tensor, condition: Condition) -> Tensor:
    """Put the fixed tokens of a condition into ``[batch, length]``.

    Raises:
        ValueError: The condition says where tokens are fixed and not which.
    """
    if condition.fixed is None:
        return z
    if condition.values is None:
        raise ValueError("condition.fixed needs condition.values, the tokens at the fixed positions")
    return torch.where(condition.fixed, condition.values, z)


def times_of(time: float, z: Tensor, condition: Condition) -> Tensor:
    """One time for all, float64 ``[batch]``; ``[batch, length]`` with 0 at fixed positions where there are any."""
    t = torch.full((z.shape[0],), time, dtype=torch.float64, device=z.device)
    return t if condition.fixed is None else torch.where(condition.fixed, 0.0, t.unsqueeze(-1))
