"""Backbone bert: an encoder of `transformers` as the network of teacher, auxiliary and student.

The encoder is made anew at the sizes of the recipe. What it lacks is added around it: an embedding of the time, a
place where input noise enters, and a head over the clean tokens. Other encoders that take ``inputs_embeds`` are wrapped
alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmmd_core import Backbone, Condition, FieldError, PluginRegistrar, hookimpl, option, per_position


class Bert(Backbone):
    """BERT without token types and pooler; its [MASK] is the process's input id, if the process has one."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(64, help="width of embeddings and hidden layers, even", minimum=2)
        depth: int = option(2, help="number of layers", minimum=1)
        heads: int = option(4, help="attention heads; must divide width", minimum=1)
        dropout: float = option(
            0.0, help="dropout of hidden layers and attention", minimum=0, below=1, same_weights=True
        )

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.width % self.heads or self.width % 2:
                raise FieldError("width", f"must be even and divided by heads {self.heads}, got {self.width}")

    def __init__(self, config: Bert.Config, *, num_inputs: int, vocab_size: int, length: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel  # heavy: only where the component is built

        sizes = BertConfig(
            vocab_size=num_inputs,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=length,
            type_vocab_size=1,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
            pad_token_id=None,  # every id is a token; none is left without a gradient
        )
        self.embedding_width = config.width
        self.encoder = BertModel(sizes, add_pooling_layer=False)
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.logits = nn.Linear(config.width, vocab_size)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """Noise of a generator may be added to the embeddings."""
        return frozenset({"input_noise"})

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`."""
        embedded = self.encoder.get_input_embeddings()(z_t) + self.time(self._waves(per_position(t, z_t)))
        if input_noise is not None:
            embedded = embedded + input_noise
        hidden: Tensor = self.encoder(inputs_embeds=embedded).last_hidden_state
        return hidden

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        logits: Tensor = self.logits(features)
        return logits

    def _waves(self, t: Tensor) -> Tensor:
        """Sines and cosines of the time at frequencies from 1 to 1000, ``[batch, length, width]``."""
        weight = self.logits.weight
        steps = torch.linspace(0, math.log(1000), self.embedding_width // 2, device=t.device, dtype=weight.dtype)
        angles = t.to(weight.dtype).unsqueeze(-1) * steps.exp()
        return torch.cat((angles.sin(), angles.cos()), dim=-1)


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the backbone."""
    registry.add("backbone", "bert", Bert)
