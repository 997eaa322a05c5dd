"""Data: training examples, reference sets, and what everybody else must know about the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dmmd_core.draws import Draws, categorical_from_uniform
from dmmd_core.interfaces.codec import Codec
from dmmd_core.interfaces.component import Component


@dataclass(frozen=True)
class DataSpec:
    """What the data knows; reaches constructors as keyword arguments, a recipe never repeats it.

    Attributes:
        vocab_size: Number of clean tokens.
        length: Tokens per sample.
        grid: Shape of the token grid, for example ``(height, width)``, whose product is `length`; None for text.
        num_classes: Number of class labels; None without labels.
    """

    vocab_size: int
    length: int
    grid: tuple[int, ...] | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Batch:
    """Examples.

    Attributes:
        tokens: Clean tokens, int64 ``[batch, length]``.
        labels: Class labels, int64 ``[batch]``, or None.
    """

    tokens: Tensor
    labels: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on `device`."""
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.tokens.to(device), labels)

    def __len__(self) -> int:
        """Number of examples."""
        return int(self.tokens.shape[0])


class Data(Component, ABC):
    """A source of tokens.

    Construction is cheap and reads nothing, so that ``--check`` works without the data; `prepare` loads.
    """

    kind: ClassVar[str] = "data"
    spec: DataSpec
    codec: Codec

    def prepare(self) -> None:
        """Load, fit the codec, build caches; called once before any other method but `spec`."""

    def facts(self) -> dict[str, float]:
        """What is worth reporting before any training, once prepared, such as a tokenizer's reconstruction error."""
        return {}

    @abstractmethod
    def training_batch(self, draws: Draws) -> Batch:
        """Training examples for the global sample indices of `draws`, on their device."""

    @abstractmethod
    def split(self, name: str) -> Batch:
        """All examples of a split, ``train`` or ``test``, on the CPU.

        Raises:
            KeyError: The data has no such split.
        """

    def size(self, split: str) -> int:
        """Number of examples of a split; raises a `KeyError` as `split` does."""
        return len(self.split(split))

    def take(self, split: str, indices: Tensor) -> Batch:
        """Some examples of a split, on the CPU, for data too large to hold whole.

        Args:
            split: Name of the split; a `KeyError` as `split` raises.
            indices: Numbers of the examples, int64 ``[n]`` on the CPU, below `size`.
        """
        whole = self.split(split)
        return Batch(whole.tokens[indices], None if whole.labels is None else whole.labels[indices])

    def originals(self, split: str) -> Tensor | None:
        """Undamaged media of a split before any codec (images uint8 ``[n, channels, height, width]``), or None."""
        return None

    def take_originals(self, split: str, indices: Tensor) -> Tensor | None:
        """Some of `originals`, for data too large to hold whole.

        Args:
            split: Name of the split; a `KeyError` as `split` raises.
            indices: Numbers of the examples, int64 ``[n]`` on the CPU, below `size`.
        """
        whole = self.originals(split)
        return None if whole is None else whole[indices]


class FiniteData(Data):
    """Data held in memory as one batch per split; every epoch is a fresh permutation."""

    def __init__(self) -> None:
        self._splits: dict[str, Batch] = {}
        self._permutations: dict[tuple[int, int], Tensor] = {}

    def split(self, name: str) -> Batch:
        """See `Data.split`."""
        if name not in self._splits:
            raise KeyError(f"no split {name!r}; there are {sorted(self._splits)} (was prepare() called?)")
        return self._splits[name]

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`; sample i of the run is item ``i mod n`` of epoch ``i // n``."""
        train = self.split("train")
        size = len(train)
        indices = draws.sample_indices.cpu()
        epochs = indices // size
        rows = torch.empty_like(indices)
        for epoch in epochs.unique().tolist():
            chosen = epochs == epoch
            rows[chosen] = self._permutation(draws.seed, epoch, size)[indices[chosen] % size]
        labels = None if train.labels is None else train.labels[rows]
        return Batch(train.tokens[rows], labels).to(draws.device)

    def _permutation(self, seed: int, epoch: int, size: int) -> Tensor:
        key = (seed, epoch)
        if key not in self._permutations:
            if len(self._permutations) >= 4:
                self._permutations.clear()
            order = Draws.for_range(seed, epoch, 0, size).uniform("epoch")
            self._permutations[key] = order.argsort(stable=True)
        return self._permutations[key]


class EnumerableData(Data):
    """Data that knows the probability of every sequence; capability ``enumerable``."""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"enumerable"})

    @abstractmethod
    def probabilities(self) -> Tensor:
        """Probability of every sequence, float64 ``[vocab ** length]``, first position most significant."""

    def sequences(self) -> Tensor:
        """All sequences in the order of `probabilities`, int64 ``[vocab ** length, length]``."""
        axes = [torch.arange(self.spec.vocab_size)] * self.spec.length
        return torch.cartesian_prod(*axes).reshape(-1, self.spec.length)

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`: independent draws, one per global sample index."""
        probs = self.probabilities().to(draws.device)
        chosen = categorical_from_uniform(probs.expand(draws.batch, -1), draws.uniform("data"))
        return Batch(self.sequences().to(draws.device)[chosen])

    def split(self, name: str) -> Batch:
        """See `Data.split`; every sequence once, whatever the split (an enumerable world has no held-out part)."""
        if name not in ("train", "test"):
            raise KeyError(f"no split {name!r}; there are ['test', 'train']")
        return Batch(self.sequences())
