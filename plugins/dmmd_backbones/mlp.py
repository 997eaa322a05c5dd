"""A small fully connected backbone for worlds that can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from dmmd_backbones.embeddings import TimeEmbedding
from dmmd_core import Backbone, Condition, option, per_position


class MLP(Backbone):
    """Embeds every position, mixes them in residual layers, and gives features per position."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(128, help="width of the hidden layers", minimum=1)
        depth: int = option(3, help="number of residual hidden layers", minimum=1)
        embedding_width: int = option(32, help="width of a position's embedding and features", minimum=1)

    def __init__(self, config: MLP.Config, *, num_inputs: int, vocab_size: int, length: int) -> None:
        super().__init__()
        self.config = config
        self.embedding_width = config.embedding_width
        self.length = length
        self.tokens = nn.Embedding(num_inputs, config.embedding_width)
        self.time = TimeEmbedding(config.embedding_width)
        self.enter = nn.Linear(length * config.embedding_width, config.width)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.width), nn.SiLU())
            for _ in range(config.depth)
        )
        self.leave = nn.Sequential(
            nn.LayerNorm(config.width), nn.Linear(config.width, length * config.embedding_width), nn.SiLU()
        )
        self.logits = nn.Linear(config.embedding_width, vocab_size)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"input_noise"})

    def units(self) -> Sequence[nn.Module]:
        """See `Backbone.units`."""
        return list(self.layers)

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`."""
        embedded = self.tokens(z_t) + self.time(per_position(t, z_t))
        if input_noise is not None:
            embedded = embedded + input_noise
        hidden = self.enter(rearrange(embedded, "batch length width -> batch (length width)"))
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return rearrange(self.leave(hidden), "batch (length width) -> batch length width", length=self.length)

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return self.logits(features)
