"""Diffusion transformer: attention with rotary or learned positions, adaptive norms on time and class.

After DiT (Peebles and Xie, arXiv:2212.09748): every layer's scale, shift and gate come from the time and class
embedding, and start at zero. With a `block_size` it is block-autoregressive (Arriola et al., arXiv:2503.09573): the
same weights encode finished blocks, as tokens at t = 0, and denoise the block that follows them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from dmmd_backbones.adaptive_block import AdaptiveBlock
from dmmd_backbones.context import Context, block_mask
from dmmd_backbones.embeddings import Conditioning
from dmmd_backbones.grids import GridPositions
from dmmd_backbones.rotary import rotary_angles
from dmmd_core import Backbone, Condition, FieldError, Requirement, UnsupportedError, option


class ShortConvolution(nn.Module):
    """Residual depthwise convolution over three neighbours along every axis; starts as the identity.

    Args:
        axes: Extents of the axes that the positions lie on, one or two; longer sequences are so many pieces of that
            size, each by itself.
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
        pieces = rearrange(x, "batch (pieces size) width -> (batch pieces) width size", size=math.prod(self.axes))
        mixed = self.mix(pieces.unflatten(-1, self.axes)).flatten(2)
        mixed = rearrange(mixed, "(batch pieces) width size -> batch (pieces size) width", batch=x.shape[0])
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
        attention: Literal["auto", "sdpa", "xformers"] = option("auto", help="attention kernel", same_weights=True)
        convolutions: int = option(
            0, help="short depthwise convolutions (three positions) on the embeddings", minimum=0
        )
        block_size: int | None = option(
            None,
            help="tokens per block: diffusion within a block, given the blocks before it; null for whole sequences",
            minimum=1,
        )
        class_conditional: bool = option(False, help="condition on the data's class labels")
        dropout: float = option(0.0, help="dropout in the feed-forward layers", minimum=0, below=1, same_weights=True)

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.width % self.heads:
                raise FieldError("heads", f"must divide width {self.width}, got {self.heads}")
            if self.block_size is not None and self.layout == "grid":
                raise FieldError("layout", "must be line with block_size, got grid: blocks follow each other on a line")
            if self.block_size is not None and self.attention == "xformers":
                raise FieldError("attention", "must be auto or sdpa with block_size, got xformers: blocks need a mask")

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
        self.block_size = config.block_size
        if config.block_size is not None and length % config.block_size:
            raise FieldError("block_size", f"must divide the data's length {length}, got {config.block_size}")
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
        self.conditioning = Conditioning(config.width, num_classes if config.class_conditional else None)
        if config.positions == "rotary":
            angles = rotary_angles(axes, head_width)
            self.register_buffer("cosine", angles.cos(), persistent=False)
            self.register_buffer("sine", angles.sin(), persistent=False)
        else:
            self.positions = GridPositions(axes, config.width)
        self.convolutions = nn.ModuleList(
            ShortConvolution((config.block_size,) if config.block_size else axes, config.width)
            for _ in range(config.convolutions)
        )
        self.blocks = nn.ModuleList(
            AdaptiveBlock(
                config.width,
                config.heads,
                attention=config.attention,
                expansion=config.expansion,
                dropout=config.dropout,
                masked=config.block_size is not None,
            )
            for _ in range(config.depth)
        )
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
        found = {"input_noise"}
        if config.class_conditional:
            found.add("labels")
        if config.block_size is not None:
            found |= {"blocks", "any_length"} if config.positions == "rotary" else {"blocks"}
        return frozenset(found)

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = []
        if config.class_conditional:
            needs.append(Requirement("data", "labels", "to condition on classes", "class_conditional"))
        if config.layout == "grid":
            needs.append(Requirement("data", "grid", "to place positions on a grid", "layout"))
        if config.block_size is not None:
            for role, reason in {
                "sampler": "to draw block by block",
                "generator": "to have input noise for a block",
                "objective": "to train on all blocks at once",
                "teacher": "to predict one block given those before it",
            }.items():
                needs.append(Requirement(role, "blocks", reason, "block_size"))
        return needs

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`; blocks get so short that they divide shortened sequences and are several."""
        block_size = config.block_size and math.gcd(config.block_size, 8)
        head_width = min(config.width // config.heads, 16)
        heads = min(config.heads, 2)
        # A smoke run must work without a GPU.
        attention = "auto" if config.attention == "xformers" else config.attention
        smaller = {"width": head_width * heads, "heads": heads, "depth": min(config.depth, 2), "attention": attention}
        return type(config)(**{**vars(config), **smaller, "block_size": block_size})

    def description(self) -> dict[str, str]:
        """See `Backbone.description`."""
        told = {"attention": self.blocks[0].kernel}
        return told if self.block_size is None else {**told, "block_size": str(self.block_size)}

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`."""
        length, size = z_t.shape[1], self.block_size
        if condition.clean is not None:
            if condition.context is not None:
                raise ValueError("condition.clean holds the whole sequence; leave condition.context out beside it")
            context = self.encode(condition.clean, dataclasses.replace(condition, clean=None))
            mask = block_mask(0, length, context.num_tokens, size or 1, clean=False, device=z_t.device)
            x, conditioning = self._run(z_t, t, condition.label, input_noise, 0, context, mask)
        else:
            if size not in (None, length):
                raise ValueError(f"a block has {size} tokens, got {length}; give condition.clean to take all at once")
            context = condition.context
            start = 0 if context is None else context.num_tokens
            x, conditioning = self._run(z_t, t, condition.label, input_noise, start, context, None)
        shift, scale = self.modulation(conditioning).chunk(2, dim=-1)
        return self.norm(x) * (1 + scale) + shift

    def encode(self, tokens: Tensor, condition: Condition) -> Context:
        """See `Backbone.encode`: keys and values of clean tokens, which are shown to the network at t = 0."""
        length, size = tokens.shape[1], self.block_size
        if size is None:
            raise UnsupportedError("this transformer takes whole sequences; give it a block_size to encode blocks")
        if length % size:
            raise ValueError(f"only whole blocks of {size} tokens can be encoded, got {length} tokens")
        context = condition.context
        past = 0 if context is None else context.num_tokens
        mask = None if length == size else block_mask(past, length, past, size, clean=True, device=tokens.device)
        zero = torch.zeros(tokens.shape[0], device=tokens.device)
        layers: list[tuple[Tensor, Tensor]] = []
        self._run(tokens, zero, condition.label, None, past, context, mask, keep=layers)
        return Context(tuple(layers))

    def _run(
        self,
        tokens: Tensor,
        t: Tensor,
        label: Tensor | None,
        input_noise: Tensor | None,
        start: int,
        context: Context | None,
        mask: Tensor | None,
        keep: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run the layers over tokens from position `start` on.

        Returns:
            The residual stream and its conditioning; into `keep` go keys and values of every layer, past ones first.
        """
        x = self.tokens(tokens) * math.sqrt(self.config.width)
        if input_noise is not None:
            x = x + input_noise
        conditioning = self.conditioning(t, label)
        rotary = None
        if self.config.positions == "rotary":
            rotary = self._rotary(start, start + tokens.shape[1])
        else:
            x = x + self._learned_positions(start, start + tokens.shape[1])
        for convolution in self.convolutions:
            x = convolution(x)
        past = [None] * len(self.blocks) if context is None else context.for_batch(len(tokens)).layers
        for block, before in zip(self.blocks, past, strict=True):
            x, keys_values = block(x, conditioning, rotary, before, mask)
            if keep is not None:
                keep.append(keys_values)
        return x, conditioning

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        return self.logits(features)

    def units(self) -> Sequence[nn.Module]:
        """See `Backbone.units`."""
        return list(self.blocks)

    def _rotary(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions ``start .. end - 1``, which may lie beyond the length of the data."""
        if end <= len(self.cosine):
            return self.cosine[start:end], self.sine[start:end]
        angles = rotary_angles((end,), self.config.width // self.config.heads)[start:].to(self.cosine.device)
        return angles.cos(), angles.sin()

    def _learned_positions(self, start: int, end: int) -> Tensor:
        total = self.positions().flatten(0, -2)
        if end > len(total):
            raise UnsupportedError(f"learned positions end at {len(total)}, got {end}; train with rotary positions")
        return total[start:end]
