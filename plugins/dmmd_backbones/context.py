"""Block-autoregressive attention: what is kept of finished blocks, and who may look at whom.

Arriola et al., arXiv:2503.09573, section 3: noisy tokens look at their own block and at the clean blocks before it,
clean tokens at their own block and at those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Context:
    """Keys and values of finished blocks.

    Attributes:
        layers: For every layer keys and values, each ``[batch, tokens, heads, head_width]``; rotary positions are
            already in the keys.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]

    @property
    def num_tokens(self) -> int:
        """Number of finished tokens."""
        return int(self.layers[0][0].shape[1])

    def for_batch(self, batch: int) -> Context:
        """Let the context of a single sample serve a whole batch."""
        shape = (batch, -1, -1, -1)
        return Context(tuple((key.expand(shape), value.expand(shape)) for key, value in self.layers))


def block_mask(start: int, length: int, past: int, block_size: int, *, clean: bool, device: torch.device) -> Tensor:
    """Say which keys each query may look at.

    Args:
        start: Position of the first query.
        length: Number of queries, which are keys as well.
        past: Number of clean keys at positions 0, 1, ... that come before the queries' own keys.
        block_size: Tokens per block.
        clean: Whether the queries are clean tokens, which see each other's earlier blocks, or noisy ones, which do not.
        device: Where to make the mask.

    Returns:
        bool ``[length, past + length]``.
    """
    query = torch.arange(start, start + length, device=device).unsqueeze(1) // block_size
    finished = torch.arange(past, device=device) // block_size < query
    own = query >= query.T if clean else query == query.T
    return torch.cat((finished, own), dim=1)
