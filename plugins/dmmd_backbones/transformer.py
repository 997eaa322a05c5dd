"""Diffusion transformer: attention with rotary or learned positions, adaptive norms on time and class.

After DiT (Peebles and Xie, arXiv:2212.09748): every block's scale, shift and gate come from the time and class
embedding, and start at zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dmmd_backbones.attention import choose_attention
from dmmd_backbones.embeddings import TimeEmbedding
from dmmd_core import Backbone, Condition, FieldError, Requirement, option


def rotary_angles(grid: Sequence[int], head_width: int, base: float = 10_000.0) -> Tensor:
    """Angles of rotary positions over a grid of any number of axes (Su et al., arXiv:2104.09864).

    Each axis gets an equal share of the head's pairs.

    Args:
        grid: Extent of every axis; their product is the length.
        head_width: Width of a head, divisible by twice the number of axes.
        base: Longest period, in positions.

    Returns:
        ``[length, head_width / 2]`` in radians.
    """
    pairs = head_width // 2 // len(grid)
    frequencies = base ** (-torch.arange(pairs) / pairs)
    positions = torch.cartesian_prod(*[torch.arange(extent) for extent in grid]).reshape(-1, len(grid))
    return (positions.unsqueeze(-1) * frequencies).flatten(1)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate pairs of channels of ``[batch, length, heads, head_width]`` by angles ``[length, head_width / 2]``."""
    first, second = x.chunk(2, dim=-1)
    cosine, sine = cosine.unsqueeze(1).to(x.dtype), sine.unsqueeze(1).to(x.dtype)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)


class Block(nn.Module):
    """Attention and feed-forward, each with an adaptive norm and a gate that start at zero."""

    def __init__(self, config: Transformer.Config) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.kernel, self.attend = choose_attention(config.attention, head_width=width // config.heads)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, config.expansion * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(config.dropout),
            nn.Linear(config.expansion * width, width),
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, conditioning: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Map ``[batch, length, width]`` to the same, given conditioning ``[batch, 1 or length, width]``."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning).chunk(6, dim=-1)
        qkv = self.to_qkv(self.norm1(x) * (1 + scale1) + shift1)
        query, key, value = rearrange(
            qkv, "batch length (three heads width) -> three batch length heads width", three=3, heads=self.heads
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        mixed = rearrange(self.attend(query, key, value), "batch length heads width -> batch length (heads width)")
        x = x + gate1 * self.to_out(mixed)
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2)


class ShortConvolution(nn.Module):
    """Residual depthwise convolution over three neighbours along every axis; starts as the identity.

    Args:
        axes: Extents of the axes that the positions lie on, one or two.
        width: Channels.
    """

    def __init__(self, axes: Sequence[int], width: int) -> None:
        super().__init__()
        self.axes = tuple(axes)
        kind = nn.Conv1d if len(self.axes) == 1 else nn.Conv2d
        self.mix = kind(width, width, 3, padding=1, groups=width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, length, width]`` to the same."""
        channels_first = x.transpose(1, 2).unflatten(-1, self.axes)
        mixed = self.mix(channels_first).flatten(2).transpose(1, 2)
        return x + self.out(nn.functional.gelu(mixed))


class Transformer(Backbone):
    """Transformer over tokens in a line or on a grid."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(256, help="width of the residual stream", minimum=8)
        depth: int = option(6, help="number of blocks", minimum=1)
        heads: int = option(4, help="attention heads; must divide width", minimum=1)
        expansion: int = option(4, help="feed-forward width as a multiple of width", minimum=1)
        positions: Literal["rotary", "learned"] = option("rotary", help="position encoding")
        layout: Literal["line", "grid"] = option("line", help="positions in one dimension, or on the data's grid")
        attention: Literal["auto", "sdpa", "xformers"] = option("auto", help="attention kernel")
        convolutions: int = option(
            0, help="short depthwise convolutions (three positions) on the embeddings", minimum=0
        )
        class_conditional: bool = option(False, help="condition on the data's class labels")
        dropout: float = option(0.0, help="dropout in the feed-forward layers", minimum=0, below=1)

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.width % self.heads:
                raise FieldError("heads", f"must divide width {self.width}, got {self.heads}")

    def __init__(
        self,
        config: Transformer.Config,
        *,
        num_inputs: int,
        vocab_size: int,
        length: int,
        grid: tuple[int, ...] | None,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding_width = config.width
        if config.convolutions and config.layout == "grid" and grid is not None and len(grid) > 2:
            raise FieldError("convolutions", f"works over one or two axes, the data's grid has {len(grid)}")
        axes = grid if config.layout == "grid" and grid is not None else (length,)
        head_width = config.width // config.heads
        if config.positions == "rotary" and head_width % (2 * len(axes)):
            raise FieldError(
                "heads",
                f"width / heads must be a multiple of {2 * len(axes)} for rotary positions over {len(axes)} axes, "
                f"got {head_width}",
            )
        self.tokens = nn.Embedding(num_inputs, config.width)
        nn.init.normal_(self.tokens.weight, std=1 / math.sqrt(config.width))
        self.time = TimeEmbedding(config.width)
        # One more row than classes: the last stands for "no label".
        self.classes = nn.Embedding(num_classes + 1, config.width) if config.class_conditional and num_classes else None
        if config.positions == "rotary":
            angles = rotary_angles(axes, head_width)
            self.register_buffer("cosine", angles.cos(), persistent=False)
            self.register_buffer("sine", angles.sin(), persistent=False)
        else:
            # A grid's position is the sum of one learned vector per axis.
            scale = 1 / math.sqrt(len(axes))
            self.axes = nn.ParameterList(nn.Parameter(scale * torch.randn(extent, config.width)) for extent in axes)
        self.convolutions = nn.ModuleList(
            ShortConvolution(axes, config.width) for _ in range(config.convolutions)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.logits = nn.Linear(config.width, vocab_size)
        nn.init.zeros_(self.logits.weight)
        nn.init.zeros_(self.logits.bias)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"input_noise", "labels"} if config.class_conditional else {"input_noise"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = []
        if config.class_conditional:
            needs.append(Requirement("data", "labels", "to condition on classes", "class_conditional"))
        if config.layout == "grid":
            needs.append(Requirement("data", "grid", "to place positions on a grid", "layout"))
        return needs

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        head_width = min(config.width // config.heads, 16)
        heads = min(config.heads, 2)
        # A smoke run must work without a GPU.
        attention = "auto" if config.attention == "xformers" else config.attention
        smaller = {"width": head_width * heads, "heads": heads, "depth": min(config.depth, 2), "attention": attention}
        return type(config)(**{**vars(config), **smaller})

    def description(self) -> dict[str, str]:
        """See `Backbone.description`."""
        return {"attention": self.blocks[0].kernel}

    def features(
        self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None
    ) -> Tensor:
        """See `Backbone.features`."""
        x = self.tokens(z_t) * math.sqrt(self.config.width)
        if input_noise is not None:
            x = x + input_noise
        conditioning = self.time(t if t.ndim == 2 else t.unsqueeze(1))
        if self.classes is not None:
            if condition.label is None:
                label = torch.full(z_t.shape[:1], self.classes.num_embeddings - 1, device=z_t.device)
            else:
                label = condition.label
            conditioning = conditioning + self.classes(label).unsqueeze(1)
        conditioning = nn.functional.silu(conditioning)
        rotary = None
        if self.config.positions == "rotary":
            rotary = (self.cosine, self.sine)
        else:
            x = x + self._learned_positions()
        for convolution in self.convolutions:
            x = convolution(x)
        for block in self.blocks:
            x = block(x, conditioning, rotary)
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return self.logits(features)

    def _learned_positions(self) -> Tensor:
        total = self.axes[0]
        for axis in list(self.axes)[1:]:
            total = (total.unsqueeze(1) + axis).flatten(0, 1)
        return total
