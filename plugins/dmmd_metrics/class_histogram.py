"""Are all classes there, in the right shares?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from dmmd_core import Codec, Data, Features, Metric, Requirement, Slot, Subject, Value, option, slot


class ClassHistogram(Metric):
    """Total variation between the classes found in samples and in real images, both by the same classifier."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "small_classifier", help="classifier")
        reference: Literal["train", "test"] = option("train", help="split of real images to compare with")

    def __init__(
        self,
        config: ClassHistogram.Config,
        *,
        features: Features,
        data: Data,
        codec: Codec,
        num_classes: int | None,
    ) -> None:
        self.config = config
        self.network = features
        self.data = data
        self.codec = codec
        self.num_classes = num_classes or 0

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "images", "to classify decoded images"),
            Requirement("data", "labels", "to know the classes"),
        ]

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        facts = self.network.prepare()
        images = self.data.originals(self.config.reference)
        assert images is not None
        self._reference = self._shares(self.network.classify(images))
        return facts

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        shares = self._shares(self.network.classify(self.codec.decode(subject.tokens)))
        value = float((shares - self._reference).abs().sum() / 2)
        reference = f"{type(self.data).__name__.lower()}/{self.config.reference}, {self.network.reference_name}"
        return [Value("class_histogram_tv", value, None, reference, len(subject.tokens))]

    def _shares(self, classes: torch.Tensor) -> torch.Tensor:
        return torch.bincount(classes, minlength=self.num_classes).double() / len(classes)
