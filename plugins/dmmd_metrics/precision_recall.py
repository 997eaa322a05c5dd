"""Improved precision and recall (Kynkäänniemi et al., arXiv:1904.06991)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import Codec, Data, Features, Metric, Requirement, RunError, Slot, Subject, Value, option, slot
from dmmd_metrics.fid import smoke_features
from dmmd_metrics.real_images import chosen_rows, image_parts, reference_name

_ROWS = 512


def neighbour_radii(points: Tensor, neighbours: int) -> Tensor:
    """Distance of every point to its k-th nearest other point: the radius of its part of the manifold (section 2).

    Args:
        points: Float64 ``[n, width]``, more than `neighbours` of them.
        neighbours: k.

    Returns:
        Float64 ``[n]``.
    """
    radii = []
    for start in range(0, len(points), _ROWS):
        distances = torch.cdist(points[start : start + _ROWS], points)
        places = torch.arange(len(distances))
        distances[places, start + places] = torch.inf  # a point is not its own neighbour, though a copy of it may be
        radii.append(distances.kthvalue(neighbours, dim=1).values)
    return torch.cat(radii)


def share_inside(points: Tensor, manifold: Tensor, radii: Tensor) -> float:
    """Share of points within the radius of at least one point of a manifold (equation 1, averaged as in equation 2).

    Args:
        points: ``[n, width]``.
        manifold: ``[m, width]``.
        radii: Of the manifold's points, ``[m]``.
    """
    inside = [(torch.cdist(part, manifold) <= radii).any(1) for part in points.split(_ROWS)]
    return float(torch.cat(inside).double().mean())


class PrecisionRecall(Metric):
    """Precision, the share of samples that lie among real images, and recall, the share of real images among samples.

    Both depend on how many images there are; the number of real ones stands beside every figure.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "inception", help="feature network")
        reference: Literal["train", "test"] = option("train", help="split of real images to compare with")
        reference_images: int = option(10000, help="most real images, chosen at random; 0 for all", minimum=0)
        neighbours: int = option(3, help="which nearest neighbour gives the radius", minimum=1)
        batch_size: int = option(256, help="images at a time", minimum=1)

    def __init__(self, config: PrecisionRecall.Config, *, features: Features, data: Data, codec: Codec) -> None:
        self.config = config
        self.network = features
        self.data = data
        self.codec = codec

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "images", "to look at decoded images")]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: a classifier that is trained on the spot instead of a network from elsewhere."""
        return cls.Config(**{**vars(config), "features": smoke_features(config.features)})

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`.

        Raises:
            RunError: There are too few real images, or none, or the features cannot be had.
        """
        facts = self.network.prepare()
        split = self.config.reference
        rows = chosen_rows(self.data, split, self.config.reference_images)
        if len(rows) <= self.config.neighbours:
            raise RunError(
                f"metric precision_recall: {len(rows)} real images of split {split!r} are too few for neighbour "
                f"{self.config.neighbours}; give more, or fewer neighbours"
            )
        parts = image_parts(self.data, split, rows, self.config.batch_size)
        self._real = torch.cat([self.network.features(images) for images in parts])
        self._radii = neighbour_radii(self._real, self.config.neighbours)
        name = reference_name(self.data, split, rows, self.network.reference_name)
        self._reference = f"{name}, neighbour {self.config.neighbours}"
        return facts

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; nothing for too few samples."""
        num = len(subject.tokens)
        if num <= self.config.neighbours:
            return []
        parts = subject.tokens.split(self.config.batch_size)
        samples = torch.cat([self.network.features(torch.as_tensor(self.codec.decode(part))) for part in parts])
        precision = share_inside(samples, self._real, self._radii)
        recall = share_inside(self._real, samples, neighbour_radii(samples, self.config.neighbours))
        return [
            Value("precision", precision, None, self._reference, num, lower_is_better=False),
            Value("recall", recall, None, self._reference, num, lower_is_better=False),
        ]
