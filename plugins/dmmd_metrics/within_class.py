"""How different are the samples of one class from each other?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmmd_core import Subject, Value
from dmmd_metrics.labelled import LabelledSamples


def mean_pairwise_distance(features: Tensor) -> tuple[float, float]:
    """Mean Euclidean distance of all pairs of rows, and its standard error.

    The error is that of a U-statistic: twice the standard deviation of the rows' mean distances to the others, over the
    root of their number (Hoeffding 1948).

    Args:
        features: ``[n, width]``, n at least 2.
    """
    num = len(features)
    to_others = torch.cdist(features, features).sum(-1) / (num - 1)
    return float(to_others.mean()), 2 * float(to_others.std()) / math.sqrt(num)


class WithinClassDiversity(LabelledSamples):
    """Mean distance in feature space between two samples drawn for the same label, averaged over the labels.

    Real data through the codec are the yardstick: less is a model that repeats itself, more one that strays.
    """

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; labels of fewer than two samples are left out."""
        if subject.labels is None:
            return []
        features = self.network.features(self.codec.decode(subject.tokens))
        groups = [features[subject.labels == label] for label in subject.labels.unique()]
        found = [mean_pairwise_distance(group) for group in groups if len(group) > 1]
        if not found:
            return []
        value = sum(distance for distance, _ in found) / len(found)
        error = math.sqrt(sum(spread**2 for _, spread in found)) / len(found)
        reference = self.network.reference_name
        return [Value("within_class_diversity", value, error, reference, len(features), lower_is_better=None)]
