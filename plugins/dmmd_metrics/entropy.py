"""Diversity of tokens and of whole samples."""

from __future__ import annotations

import torch
from torch import Tensor

from dmmd_core import Metric, Subject, Value


class TokenEntropy(Metric):
    """Entropy of the tokens within a sample, averaged over samples, in nats; that of all pooled; distinct samples."""

    def __init__(self, config: TokenEntropy.Config, *, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        within = torch.stack([_entropy(torch.bincount(row)) for row in subject.tokens])
        error = float(within.std()) / len(within) ** 0.5 if len(within) > 1 else None
        counts = torch.bincount(subject.tokens.flatten(), minlength=self.vocab_size)
        num = len(subject.tokens)
        distinct = len(torch.unique(subject.tokens, dim=0)) / num
        return [
            Value("token_entropy", float(within.mean()), error, "", num, None),
            Value("pooled_token_entropy", float(_entropy(counts)), None, "", num, None),
            Value("distinct_samples", distinct, None, "", num, False),
        ]


def _entropy(counts: Tensor) -> Tensor:
    shares = counts.double() / counts.sum()
    return -torch.special.xlogy(shares, shares).sum()
