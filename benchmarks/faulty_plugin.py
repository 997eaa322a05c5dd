"""Components that go wrong as they are told, for `fault_campaign.py`: a plugin in a single file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_backbones.transformer import Transformer
from dmmd_core import Batch, Draws, Losses, Metric, PluginRegistrar, Samples, Subject, Value, hookimpl, option
from dmmd_data.enumerable import MarkovChain
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_samplers.ancestral import Ancestral


class _BadGradient(torch.autograd.Function):
    """The number as it is, its gradient NaN."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """Pass the value on."""
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Spoil the gradient."""
        return gradient * torch.nan


class FaultyMomentMatching(MomentMatching):
    """Moment matching that goes wrong at some steps."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MomentMatching.Config):
        """Parameters."""

        first: int = option(0, help="first step that goes wrong", minimum=0)
        count: int = option(1, help="how many do", minimum=0)
        what: Literal["loss", "gradient", "metric", "weights"] = option("loss", help="what goes wrong")
        value: Literal["nan", "inf"] = option("nan", help="what a loss becomes")

    def loss(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> Losses:
        """See `Objective.loss`."""
        losses, config = super().loss(turn, batch, draws), self.config
        if not config.first <= draws.step < config.first + config.count:
            return losses
        name = next(iter(losses.by_player))
        if config.what == "loss":
            losses.by_player[name] = losses.by_player[name] * float(config.value)
        elif config.what == "gradient":
            losses.by_player[name] = _BadGradient.apply(losses.by_player[name])
        elif config.what == "metric":
            return replace(losses, metrics={key: value * torch.nan for key, value in losses.metrics.items()})
        return losses

    def after_update(self, step: int) -> None:
        """See `Objective.after_update`."""
        super().after_update(step)
        if self.config.what == "weights" and step >= self.config.first:
            with torch.no_grad():
                next(self.players()["student"].module.parameters()).view(-1)[0] = torch.nan


class FaultyTransformer(Transformer):
    """A transformer whose features are NaN at some calls, or where no gradient is taken (`first` of -1)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Transformer.Config):
        """Parameters."""

        first: int = option(0, help="first call that goes wrong; -1 for those without gradients")
        count: int = option(1, help="how many do", minimum=0)

    def features(self, *arguments: Any, **keywords: Any) -> Any:
        """See `Backbone.features`."""
        found = super().features(*arguments, **keywords)
        self.calls = getattr(self, "calls", 0) + 1
        first = self.config.first
        wrong = not torch.is_inference_mode_enabled() and first < self.calls <= first + self.config.count
        if first < 0:
            wrong = not torch.is_grad_enabled() and not self.training and self.calls > 0
        return found * torch.nan if wrong else found


class FaultyAncestral(Ancestral):
    """A sampler whose tokens do not exist, or that meets a network whose logits are NaN."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Ancestral.Config):
        """Parameters."""

        what: Literal["beyond", "below", "nan", "short", "logits"] = option("beyond", help="what is wrong")

    def sample(self, denoiser: Any, *arguments: Any, **keywords: Any) -> Samples:
        """See `Sampler.sample`."""
        if self.config.what == "logits":
            head = denoiser.backbone.head
            denoiser.backbone.head = lambda features: head(features) * torch.nan
            try:
                return super().sample(denoiser, *arguments, **keywords)
            finally:
                del denoiser.backbone.head
        samples = super().sample(denoiser, *arguments, **keywords)
        tokens = samples.tokens.clone()
        if self.config.what == "nan":
            return Samples(tokens.double() * torch.nan)
        if self.config.what == "short":
            return Samples(tokens[:, 1:])
        tokens[0, 0] = self.process.vocab_size if self.config.what == "beyond" else -1
        return Samples(tokens)


class FaultyMetric(Metric):
    """A figure that is no number."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        what: Literal["nan", "inf", "error", "fact"] = option("nan", help="what is not finite")

    def __init__(self, config: FaultyMetric.Config) -> None:
        self.config = config

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        return {"faulty_metric_fact": float("nan")} if self.config.what == "fact" else {}

    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`; the yardsticks are judged well."""
        good = subject.denoiser is None or self.config.what in ("error", "fact")
        value = 1.0 if good else float(self.config.what)
        error = float("nan") if self.config.what == "error" else None
        return [Value("faulty_metric", value, error)]


class FaultyLetters(MarkovChain):
    """A Markov chain whose sequences are spoilt."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MarkovChain.Config):
        """Parameters."""

        what: Literal["nan", "beyond", "held_out"] = option("nan", help="what is wrong with the tokens")

    def take(self, split: str, indices: Tensor) -> Batch:
        """See `Data.take`."""
        return self._spoilt(super().take(split, indices), split)

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`."""
        return self._spoilt(super().training_batch(draws), "train")

    def _spoilt(self, batch: Batch, split: str) -> Batch:
        what = self.config.what
        if what == "held_out":
            return replace(batch, tokens=batch.tokens.double() * torch.nan) if split == "test" else batch
        if what == "nan":
            return replace(batch, tokens=batch.tokens.double() * torch.nan)
        return replace(batch, tokens=batch.tokens + self.spec.vocab_size)


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register everything that goes wrong."""
    registry.add("objective", "faulty_moment_matching", FaultyMomentMatching)
    registry.add("backbone", "faulty_transformer", FaultyTransformer)
    registry.add("sampler", "faulty_ancestral", FaultyAncestral)
    registry.add("metric", "faulty_metric", FaultyMetric)
    registry.add("data", "faulty_letters", FaultyLetters)
