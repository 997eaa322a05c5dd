"""Distributions that know the probability of every sequence, for tests and exact experiments."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core import Codec, DataSpec, EnumerableData, FieldError, Slot, option, slot

_MAX_SEQUENCES = 20_000


class _Enumerable(EnumerableData):
    """Shared by the worlds below: size check, codec, cached probabilities."""

    def __init__(self, vocab_size: int, length: int, codec: Codec) -> None:
        if vocab_size**length > _MAX_SEQUENCES:
            raise FieldError(
                "length", f"{vocab_size}^{length} sequences are too many to enumerate (at most {_MAX_SEQUENCES})"
            )
        self.spec = DataSpec(vocab_size=vocab_size, length=length)
        self.codec = codec
        self._probabilities: Tensor | None = None

    def probabilities(self) -> Tensor:
        """See `EnumerableData.probabilities`."""
        if self._probabilities is None:
            self._probabilities = self._compute()
        return self._probabilities

    @abstractmethod
    def _compute(self) -> Tensor:
        """Probability of every sequence."""


class TiedCoins(_Enumerable):
    """Coins that always show the same side: all heads or all tails, each with probability 1/2."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        coins: int = option(2, help="number of coins", minimum=2, maximum=12)
        codec: Slot = slot("codec", "integers", help="how tokens are shown")

    def __init__(self, config: TiedCoins.Config, *, codec: Codec) -> None:
        self.config = config
        super().__init__(2, config.coins, codec)

    def _compute(self) -> Tensor:
        probs = torch.zeros(2**self.config.coins, dtype=torch.float64)
        probs[0] = probs[-1] = 0.5
        return probs


class MarkovChain(_Enumerable):
    """A chain with a uniform first letter and transition rows ``softmax(sharpness * N(0, 1))``."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        letters: int = option(4, help="size of the alphabet", minimum=2)
        length: int = option(4, help="letters per sequence", minimum=1)
        sharpness: float = option(3.0, help="scale of the Gaussian logits of a transition row", minimum=0)
        seed: int = option(0, help="seed of the transition matrix", minimum=0)
        codec: Slot = slot("codec", "integers", help="how tokens are shown")

    def __init__(self, config: MarkovChain.Config, *, codec: Codec) -> None:
        self.config = config
        super().__init__(config.letters, config.length, codec)

    def _compute(self) -> Tensor:
        letters = self.config.letters
        source = torch.Generator().manual_seed(self.config.seed)
        logits = torch.randn(letters, letters, generator=source).double()
        rows = (self.config.sharpness * logits).softmax(-1)
        sequences = self.sequences()
        probs = torch.full((len(sequences),), 1.0 / letters, dtype=torch.float64)
        for here in range(self.config.length - 1):
            probs = probs * rows[sequences[:, here], sequences[:, here + 1]]
        return probs


class Mixture(_Enumerable):
    """A mixture of product distributions with equal weights; correlation comes from the component alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        components: int = option(3, help="number of product distributions", minimum=1)
        letters: int = option(3, help="size of the alphabet", minimum=2)
        length: int = option(3, help="letters per sequence", minimum=1)
        sharpness: float = option(3.0, help="scale of the Gaussian logits", minimum=0)
        seed: int = option(0, help="seed of the components", minimum=0)
        codec: Slot = slot("codec", "integers", help="how tokens are shown")

    def __init__(self, config: Mixture.Config, *, codec: Codec) -> None:
        self.config = config
        super().__init__(config.letters, config.length, codec)

    def _compute(self) -> Tensor:
        config = self.config
        source = torch.Generator().manual_seed(config.seed)
        shape = (config.components, config.length, config.letters)
        tables = (config.sharpness * torch.randn(shape, generator=source).double()).softmax(-1)
        sequences = self.sequences()
        positions = torch.arange(config.length)
        per_component = torch.stack([table[positions, sequences].prod(-1) for table in tables])
        return per_component.mean(0)
