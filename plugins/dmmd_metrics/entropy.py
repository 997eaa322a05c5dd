"""Diversity of tokens and of whole samples."""

from __future__ import annotations

import torch

from dmmd_core import Metric, Subject, Value


class TokenEntropy(Metric):
    """Entropy of the tokens pooled over all samples and positions, in nats; and the share of distinct samples."""

    def __init__(self, config: TokenEntropy.Config, *, vocab_size: int) -> None:
        self.config = config
        self.vocab_size = vocab_size

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        counts = torch.bincount(subject.tokens.flatten(), minlength=self.vocab_size).double()
        shares = counts / counts.sum()
        entropy = -torch.special.xlogy(shares, shares).sum()
        num = len(subject.tokens)
        distinct = len(torch.unique(subject.tokens, dim=0)) / num
        return [
            Value("token_entropy", float(entropy), None, "", num, None),
            Value("distinct_samples", distinct, None, "", num, False),
        ]
