"""Metric distinct: how many different samples there are, which falls when a student repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dmmd_core import Metric, PluginRegistrar, Subject, Value, hookimpl, option


class Distinct(Metric):
    """Share of distinct samples among the first `num` of each model; meaningful beside that of real data."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        num: int = option(500, help="samples looked at; the share depends on it", minimum=1)

    def __init__(self, config: Distinct.Config) -> None:
        self.config = config

    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`; also called with real data, which has no denoiser."""
        tokens = subject.tokens[: self.config.num]
        share = len(tokens.unique(dim=0)) / len(tokens)
        return [Value("distinct", share, num_samples=len(tokens), lower_is_better=None)]


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the metric."""
    registry.add("metric", "distinct", Distinct)
