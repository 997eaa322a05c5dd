"""Pixel levels as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dmmd_core import ImageCodec, option


class Pixels(ImageCodec):
    """Every channel of every pixel is one token, in the order row, column, channel."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        levels: int = option(17, help="brightness levels, spread evenly over 0..255", minimum=2, maximum=256)
        height: int = option(8, help="image height in pixels", minimum=1)
        width: int = option(8, help="image width in pixels", minimum=1)
        channels: int = option(1, help="color channels", minimum=1)

    def __init__(self, config: Pixels.Config) -> None:
        self.config = config
        self.vocab_size = config.levels
        self.image_shape = (config.channels, config.height, config.width)
        self.grid = (config.height, config.width) + ((config.channels,) if config.channels > 1 else ())

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"images"})

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`."""
        self.check_tokens(tokens)
        channels, height, width = self.image_shape
        bright = (tokens.double() * 255 / (self.vocab_size - 1)).round().to(torch.uint8)
        pattern = "n (height width channels) -> n channels height width"
        return rearrange(bright, pattern, height=height, width=width, channels=channels)

    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`; the nearest level."""
        levels = (media.double() * (self.vocab_size - 1) / 255).round().long()
        return rearrange(levels, "n channels height width -> n (height width channels)")

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return f"pixels-{self.vocab_size}-" + "x".join(map(str, self.image_shape))
