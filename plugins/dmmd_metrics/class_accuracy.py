"""Do samples show the class that was asked for?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmmd_core import Codec, Features, Metric, Requirement, Slot, Subject, Value, slot


class ClassAccuracy(Metric):
    """Share of samples in which a classifier of real images sees the label that they were drawn for.

    Of real images through the codec it is the classifier's own accuracy, which no model need exceed.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "small_classifier", help="classifier")

    def __init__(self, config: ClassAccuracy.Config, *, features: Features, codec: Codec) -> None:
        self.config = config
        self.network = features
        self.codec = codec

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "images", "to classify decoded images"),
            Requirement("backbone", "labels", "to ask for classes"),
        ]

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        return self.network.prepare()

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; the standard error is that of a binomial share."""
        if subject.labels is None:
            return []
        found = self.network.classify(self.codec.decode(subject.tokens))
        num = len(found)
        share = float((found == subject.labels).double().mean())
        error = math.sqrt(share * (1 - share) / num)
        return [Value("class_accuracy", share, error, self.network.reference_name, num, lower_is_better=False)]
