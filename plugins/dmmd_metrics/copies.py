"""Does a model copy its training images?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import Codec, Data, Metric, Requirement, Subject, Value, option


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
        """See `Metric.prepare`."""
        self._train = self.data.split("train").tokens
        self._images = self._pixels(self._train)
        held_out = self._distances(self.data.split("test").tokens)
        self._threshold = float(held_out.quantile(self.config.quantile))
        return {"near_copy_distance": self._threshold}

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; silent for the training data, which are copies of themselves."""
        if subject.model == "train":
            return []
        name, num = type(self.data).__name__.lower() + "/train", len(subject.tokens)
        near = float((self._distances(subject.tokens) < self._threshold).double().mean())
        known = {tuple(row) for row in self._train.tolist()}
        exact = sum(tuple(row) in known for row in subject.tokens.tolist()) / num
        return [
            Value("near_copies", near, _share_error(near, num), name, num),
            Value("exact_copies", exact, _share_error(exact, num), name, num),
        ]

    def _pixels(self, tokens: Tensor) -> Tensor:
        images: Tensor = self.codec.decode(tokens)
        return images.flatten(1).double() / 255

    def _distances(self, tokens: Tensor) -> Tensor:
        parts = [torch.cdist(part, self._images).min(-1).values for part in self._pixels(tokens).split(1000)]
        return torch.cat(parts)


def _share_error(share: float, num: int) -> float:
    """Standard error of a share among independent samples."""
    return math.sqrt(share * (1 - share) / num)
