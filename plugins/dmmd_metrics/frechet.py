"""Frechet distance between Gaussians fitted to features (Heusel et al., arXiv:1706.08500)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import Codec, Data, Features, Metric, Requirement, Slot, Subject, Value, option, slot


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Frechet distance between Gaussians with the moments of two feature sets.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))``

    Args:
        first: Features ``[n, width]``, float64.
        second: Features ``[m, width]``, float64.
    """
    mean1, mean2 = first.mean(0), second.mean(0)
    cov1, cov2 = first.T.cov(), second.T.cov()
    values, vectors = torch.linalg.eigh(cov1)
    root1 = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root1 @ cov2 @ root1).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


class FrechetDistance(Metric):
    """Distance of decoded samples to real images, which no codec has touched."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "small_classifier", help="feature network")
        reference: Literal["train", "test"] = option("test", help="split of real images to compare with")

    def __init__(self, config: FrechetDistance.Config, *, features: Features, data: Data, codec: Codec) -> None:
        self.config = config
        self.network = features
        self.data = data
        self.codec = codec

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "images", "to look at decoded images")]

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        facts = self.network.prepare()
        images = self.data.originals(self.config.reference)
        assert images is not None
        self._reference = self.network.features(images)
        return facts

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        features = self.network.features(self.codec.decode(subject.tokens))
        if len(features) < 2:
            return []
        reference = f"{type(self.data).__name__.lower()}/{self.config.reference}, {self.network.reference_name}"
        value = frechet_distance(features, self._reference)
        return [Value("frechet_distance", value, None, reference, len(features))]
