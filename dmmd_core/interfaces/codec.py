"""Codec: tokens to media and back, saved beside the models that speak these tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor

from dmmd_core.interfaces.component import Component

Media = Literal["tokens", "image", "text"]


class Codec(Component, ABC):
    """Translates between tokens and what a person looks at.

    Attributes:
        media: What `decode` returns: ``image`` (uint8 ``[n, channels, height, width]``), ``text`` (list of str)
            or ``tokens`` (int64 ``[n, length]``).
    """

    kind: ClassVar[str] = "codec"
    media: Media = "tokens"

    @abstractmethod
    def decode(self, tokens: Tensor) -> Any:
        """Turn tokens, int64 ``[n, length]``, into media."""

    @abstractmethod
    def encode(self, media: Any) -> Tensor:
        """Turn media into tokens, int64 ``[n, length]``."""

    def state(self) -> dict[str, Tensor]:
        """Tensors that define the codec, saved beside the models."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore `state`; raises a `KeyError` where a tensor is missing."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of everything that decides what a token means."""


class ImageCodec(Codec):
    """A codec of images that knows its sizes before it is fitted.

    Attributes:
        vocab_size: Number of tokens.
        image_shape: ``(channels, height, width)`` of the images.
        grid: Shape of the token grid.
    """

    media: Media = "image"
    vocab_size: int
    image_shape: tuple[int, int, int]
    grid: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens per image."""
        return math.prod(self.grid)

    def fit(self, images: Tensor) -> None:
        """Fit to images, uint8 ``[n, channels, height, width]``; the same images give the same codec."""
