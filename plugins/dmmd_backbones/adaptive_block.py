"""The transformer block of this package: adaptive norms on time and class (DiT; Peebles and Xie, arXiv:2212.09748)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from dmmd_backbones.attention import Kernel, choose_attention
from dmmd_backbones.rotary import rotate


class AdaptiveBlock(nn.Module):
    """Attention and feed-forward, each with an adaptive norm and a gate that start at zero.

    Args:
        width: Width of the residual stream.
        heads: Attention heads.
        attention: Kernel that is asked for.
        expansion: Feed-forward width as a multiple of `width`.
        dropout: Of the feed-forward layers.
        attention_dropout: Of attention weights.
        masked: Whether `forward` will be given a mask.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        attention: Kernel,
        expansion: int,
        dropout: float,
        attention_dropout: float = 0.0,
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.attention_dropout = heads, attention_dropout
        self.kernel, self.attend = choose_attention(attention, head_width=width // heads, masked=masked)
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.to_qkv = nn.Linear(width, 3 * width)
        self.to_out = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, expansion * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(expansion * width, width),
        )
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        conditioning: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map ``[batch, length, width]`` to the same.

        Args:
            x: Residual stream.
            conditioning: ``[batch, 1 or length, width]``.
            rotary: Cosines and sines of the positions, or None.
            past: Keys and values of finished blocks, or None.
            mask: See `Attention`.

        Returns:
            The new residual stream, and all keys and values, past ones first.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(conditioning).chunk(6, dim=-1)
        qkv = self.to_qkv(self.norm1(x) * (1 + scale1) + shift1)
        query, key, value = rearrange(
            qkv, "batch length (three heads width) -> three batch length heads width", three=3, heads=self.heads
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if past is not None:
            key, value = torch.cat((past[0], key), dim=1), torch.cat((past[1], value), dim=1)
        mixed = self.attend(query, key, value, mask, dropout=self.attention_dropout if self.training else 0.0)
        x = x + gate1 * self.to_out(rearrange(mixed, "batch length heads width -> batch length (heads width)"))
        return x + gate2 * self.feed_forward(self.norm2(x) * (1 + scale2) + shift2), (key, value)
