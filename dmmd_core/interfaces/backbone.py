"""Backbone: the network proper, split into features and head so that logits are made only where needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor, nn

from dmmd_core.errors import UnsupportedError
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Condition


class Backbone(nn.Module, Component, ABC):
    """Turns noisy tokens into features per position, and features into logits.

    Attributes:
        embedding_width: Width of the input embeddings, to which a generator may add its projected noise.
        block_size: Tokens per block, for backbones with capability ``blocks``; None for those that take whole
            sequences.
    """

    kind: ClassVar[str] = "backbone"
    embedding_width: int
    block_size: int | None = None

    @abstractmethod
    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """Compute features.

        With a `block_size` these are the features of the one block that follows ``condition.context`` or, where
        ``condition.clean`` holds the clean tokens of the whole sequence, those of all blocks at once, each given the
        clean blocks before it and nothing else.

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

    def encode(self, tokens: Tensor, condition: Condition) -> object:
        """Encode finished blocks; arguments, result and errors as for `Denoiser.encode`."""
        raise UnsupportedError(f"{type(self).__name__} takes whole sequences and encodes no blocks")

    def units(self) -> Sequence[nn.Module]:
        """Its repeated modules, whose ``forward`` takes and returns tensors.

        They are what is compiled, computed again in the backward pass and sharded, each by itself. A backbone that
        names none can be neither compiled nor checkpointed, and is sharded as a whole.
        """
        return ()

    def description(self) -> dict[str, str]:
        """Choices made at construction that a log should tell, such as the attention kernel."""
        return {}
