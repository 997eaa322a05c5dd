"""Do samples show the class that was asked for?"""

from __future__ import annotations

import math

from dmmd_core import Subject, Value
from dmmd_metrics.labelled import LabelledSamples


class ClassAccuracy(LabelledSamples):
    """Share of samples in which a classifier of real images sees the label that they were drawn for.

    Of real images through the codec it is the classifier's own accuracy, which no model need exceed.
    """

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; the standard error is that of a binomial share."""
        if subject.labels is None:
            return []
        found = self.network.classify(self.codec.decode(subject.tokens))
        num = len(found)
        share = float((found == subject.labels).double().mean())
        error = math.sqrt(share * (1 - share) / num)
        return [Value("class_accuracy", share, error, self.network.reference_name, num, lower_is_better=False)]
