"""What the observers have in common: names of scalars, and samples as one picture or one text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from dmmd_core import Value, is_circumstance
from dmmd_core.media import image_grid


def grouped(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a step, what was learned under ``training/`` and how under ``engine/``."""
    return {f"{'engine' if is_circumstance(name) else 'training'}/{name}": value for name, value in metrics.items()}


def named(figures: Sequence[Value]) -> Iterator[tuple[str, Value]]:
    """Figures with their names; where a metric judged against several references, these as well."""
    counts = Counter(figure.metric for figure in figures)
    for figure in figures:
        yield (f"{figure.metric} ({figure.reference})" if counts[figure.metric] > 1 else figure.metric), figure


def picture(samples: Tensor, count: int) -> Tensor:
    """The first images, laid out in a grid: uint8 ``[3, height, width]``."""
    return image_grid(samples[:count], tile=48)
