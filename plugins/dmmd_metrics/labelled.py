"""What metrics of samples that were drawn for a label share: a feature network that classifies."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dmmd_core import Codec, Features, Metric, Requirement, Slot, slot


class LabelledSamples(Metric, ABC):
    """A metric that looks at decoded images beside the labels they were asked for."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "small_classifier", help="feature network, a classifier of real images")

    def __init__(self, config: LabelledSamples.Config, *, features: Features, codec: Codec) -> None:
        self.config = config
        self.network = features
        self.codec = codec

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "images", "to look at decoded images"),
            Requirement("backbone", "labels", "to ask for classes"),
        ]

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        return self.network.prepare()
