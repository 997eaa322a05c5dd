"""Total variation between a sampler's distribution and the true one, where all sequences can be enumerated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import Draws, EnumerableData, Metric, Requirement, Subject, Value, option

# Fewer groups than this make a bootstrap that means little; a single one would claim an error of zero.
_MIN_GROUPS = 20


def outer(probs: Tensor) -> Tensor:
    """Joint distribution of independent positions: ``[n, length, vocab]`` to ``[n, vocab ** length]``."""
    joint = probs[:, 0]
    for position in range(1, probs.shape[1]):
        joint = (joint.unsqueeze(-1) * probs[:, position].unsqueeze(1)).flatten(1)
    return joint


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half the sum of absolute differences over the last axis."""
    return (first - second).abs().sum(-1) / 2


class TotalVariation(Metric):
    """Exact by transition matrices for denoisers without latent; otherwise from averaged last-step probabilities."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        num_samples: int = option(40_000, help="sequences averaged where the distribution is not exact", minimum=100)
        batch_size: int = option(1000, help="most sequences at a time, and in a unit of the bootstrap", minimum=1)
        bootstrap: int = option(200, help="bootstrap resamples for the standard error", minimum=2)

    def __init__(self, config: TotalVariation.Config, *, data: EnumerableData) -> None:
        self.config = config
        self.data = data

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "enumerable", "to know the truth"),
            Requirement("sampler", "last_step", "to average last-step probabilities"),
            Requirement("sampler", "distribution", "to enumerate denoisers without latent"),
        ]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return cls.Config(num_samples=min(config.num_samples, 1000), batch_size=100, bootstrap=20)

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`."""
        if subject.denoiser is None or subject.sampler is None:
            return []
        truth = self.data.probabilities()
        name, reference = "total_variation", "exact"
        if not subject.denoiser.takes_latent:
            exact = subject.sampler.distribution(subject.denoiser, num_steps=subject.num_steps)
            return [Value(name, float(total_variation(exact, truth)), None, reference, 0)]
        groups, sizes = self._groups(subject)
        value = float(total_variation(groups.sum(0) / sizes.sum(), truth))
        error = self._bootstrap(groups, sizes, subject.draws.seed)
        return [Value(name, value, error, reference, self.config.num_samples)]

    def _groups(self, subject: Subject) -> tuple[Tensor, Tensor]:
        """Summed distributions ``[groups, vocab ** length]`` and sizes ``[groups]`` of the batches, float64."""
        assert subject.denoiser is not None
        assert subject.sampler is not None
        sums, sizes = [], []
        size = min(self.config.batch_size, self.config.num_samples // _MIN_GROUPS)
        draws = subject.draws.within("total_variation")
        for start in range(0, self.config.num_samples, size):
            count = min(size, self.config.num_samples - start)
            indices = torch.arange(start, start + count, device=draws.device)
            samples = subject.sampler.sample(
                subject.denoiser,
                Draws(draws.seed, 0, indices, draws.scope),
                num_steps=subject.num_steps,
                last_step=True,
            )
            assert samples.last_log_probs is not None
            sums.append(outer(samples.last_log_probs.double().exp()).sum(0).cpu())
            sizes.append(count)
        return torch.stack(sums), torch.tensor(sizes, dtype=torch.float64)

    def _bootstrap(self, groups: Tensor, sizes: Tensor, seed: int) -> float:
        """Standard deviation of the distance between resampled means and the mean of all groups' distance."""
        count = len(groups)
        draws = Draws.for_range(seed, 0, 0, self.config.bootstrap)
        chosen = draws.integers("bootstrap", count, (count,))
        resampled = torch.stack([groups[rows].sum(0) / sizes[rows].sum() for rows in chosen])
        return float(total_variation(resampled, self.data.probabilities()).std())
