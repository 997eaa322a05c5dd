"""Does a model copy its training images?"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmd_core import Codec, Data, Metric, Requirement, Subject, Value, option

_ROWS = 1000


class Copies(Metric):
    """Share of samples nearer to a training image than nearly all held-out images are, and share of exact copies.

    All images are compared after the codec, in Euclidean distance of pixels.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        quantile: float = option(
            0.05, help="quantile of the held-out images' distances that counts as near", above=0, below=1
        )

    def __init__(self, config: Copies.Config, *, data: Data, codec: Codec) -> None:
        self.config = config
        self.data = data
        self.codec = codec

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "images", "to compare images"),
            Requirement("data", "held_out", "to know how near new images come"),
        ]

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`; the training images are kept as bytes, 3 KB each for CIFAR-10."""
        parts, self._known = [], set()
        for rows in torch.arange(self.data.size("train")).split(_ROWS):
            tokens = self.data.take("train", rows).tokens
            self._known |= {_digest(row) for row in tokens.numpy()}
            parts.append(torch.as_tensor(self.codec.decode(tokens)).flatten(1))
        self._images = torch.cat(parts)
        held_out = torch.cat(
            [
                self._distances(self.data.take("test", rows).tokens)
                for rows in torch.arange(self.data.size("test")).split(_ROWS)
            ]
        )
        self._threshold = float(held_out.quantile(self.config.quantile))
        return {"near_copy_distance": self._threshold}

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; silent for the training data, which are copies of themselves."""
        if subject.model == "train":
            return []
        name, num = type(self.data).__name__.lower() + "/train", len(subject.tokens)
        near = float((self._distances(subject.tokens) < self._threshold).double().mean())
        exact = sum(_digest(row) in self._known for row in subject.tokens.numpy()) / num
        return [
            Value("near_copies", near, _share_error(near, num), name, num),
            Value("exact_copies", exact, _share_error(exact, num), name, num),
        ]

    def _distances(self, tokens: Tensor) -> Tensor:
        """Distance of every sample to its nearest training image, pixels in [0, 1]."""
        found = []
        for part in tokens.split(_ROWS):
            pixels = torch.as_tensor(self.codec.decode(part)).flatten(1).double() / 255
            training = (images.double() / 255 for images in self._images.split(_ROWS))
            nearest = [torch.cdist(pixels, images).min(-1).values for images in training]
            found.append(torch.stack(nearest).min(0).values)
        return torch.cat(found)


def _digest(row: np.ndarray) -> bytes:
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


def _share_error(share: float, num: int) -> float:
    """Standard error of a share among independent samples."""
    return math.sqrt(share * (1 - share) / num)
