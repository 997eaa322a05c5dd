"""Codec: tokens to media and back, saved beside the models that speak these tokens."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from dmmd_core.errors import RunError
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


class TextCodec(Codec):
    """A tokenizer: text to tokens of any number and back; capability ``text``.

    Attributes:
        vocab_size: Number of tokens, known before the codec is fitted, the boundary included.
        boundary: Token that ends a document.
    """

    media: Media = "text"
    vocab_size: int
    boundary: int

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"text"})

    def fit(self, documents: Iterable[str]) -> None:
        """Learn from the training documents, or load what the tokenizer needs; called before any encoding.

        Raises:
            RunError: The documents, or what is to be loaded, do not give the vocabulary that was asked for.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Turn texts into tokens, an integer array each, without boundaries."""

    @abstractmethod
    def cache_key(self) -> str:
        """What decides the tokens of a given corpus, known before `fit`: the key of a cache of tokens."""

    @abstractmethod
    def decode(self, tokens: Tensor) -> list[str]:
        """Turn tokens, int64 ``[n, length]``, into a text each."""

    def encode_text(self, text: str) -> list[int]:
        """Turn one text into tokens."""
        return [int(token) for token in self.encode_texts([text])[0]]

    def encode(self, media: Any) -> Tensor:
        """Turn texts that happen to have equally many tokens into int64 ``[n, length]``.

        Raises:
            ValueError: They have different numbers of tokens.
        """
        rows = self.encode_texts(list(media))
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(f"the texts have {lengths[0]} to {lengths[-1]} tokens; encode them one at a time")
        return torch.from_numpy(np.stack(rows).astype(np.int64)) if rows else torch.empty(0, 0, dtype=torch.int64)


class Images(Protocol):
    """Images by number, in memory (a tensor is one) or read when they are asked for."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some images, uint8 ``[n, channels, height, width]``, by their numbers, int64 ``[n]``."""
        ...


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

    @property
    def title(self) -> str:
        """What this codec is called in messages; it may have been trained or loaded in many ways."""
        return type(self).__name__

    def fit(self, images: Images, cache: Path | None = None) -> None:
        """Fit to the training images, or load what the codec needs; the same images give the same codec.

        Args:
            images: Of `image_shape`.
            cache: Folder where what took long may be kept under a fingerprint of its own, or None.

        Raises:
            RunError: What is to be loaded is not there or of other sizes.
        """

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise a `RunError` for tokens that the codebook does not have."""
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.vocab_size:
            wrong = int(tokens.max()) if int(tokens.max()) >= self.vocab_size else int(tokens.min())
            raise RunError(
                f"token {wrong} is beyond the codebook of {self.title}, which has the tokens 0..{self.vocab_size - 1}; "
                "these tokens were made with another tokenizer"
            )
