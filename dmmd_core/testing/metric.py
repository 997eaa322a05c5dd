"""Clauses for metrics."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dmmd_core.draws import Draws
from dmmd_core.interfaces import (
    Batch,
    Data,
    Denoiser,
    EnumerableData,
    Metric,
    Process,
    Sampler,
    Samples,
    Subject,
    Value,
)
from dmmd_core.interfaces.denoiser import Condition
from dmmd_core.testing.report import Clause, Skip, clause, expect
from dmmd_core.testing.subject import GENERAL, Case, needs
from dmmd_core.testing.worlds import Absorbing, Enumerating, Even, worlds

_NUM = 80


class _OneStep(Sampler):
    """Draws every position from the prediction at t = 1; knows its distribution."""

    def __init__(self, process: Process, data: Data) -> None:
        self.process = process
        self.data = data

    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
        length: int | None = None,
    ) -> Samples:
        """See `Sampler.sample`."""
        length = length or self.data.spec.length
        z = self.process.prior_sample(length, draws)
        t = torch.ones(draws.batch, dtype=torch.float64)
        log_probs = denoiser(z, t, condition, denoiser.draw_latent(draws)).log_probs().view(draws.batch, length, -1)
        return Samples(draws.categorical("x", log_probs.exp()), log_probs)

    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> torch.Tensor:
        """See `Sampler.distribution`."""
        draws = Draws.for_range(0, 0, 0, 1)
        last = self.sample(denoiser, draws, num_steps=num_steps).last_log_probs
        assert last is not None
        joint = torch.ones(1, dtype=torch.float64)
        for row in last[0].exp():
            joint = (joint.unsqueeze(-1) * row).flatten()
        return joint


class MetricCase(Case):
    """A metric with the cheapest data of the kit that it can work with."""

    def prepare(self) -> None:
        """Choose the data and offer what a run would."""
        needed = needs(self.part, "data")
        fitting = [world for world in worlds() if needed <= world.provides]
        if not fitting:
            raise ValueError(f"it needs data with {', '.join(sorted(needed))}, which the kit does not have")
        self.data: Data = fitting[0].data
        self.data.prepare()
        size = self.data.spec.vocab_size
        self.process: Process = Absorbing(size) if "masks" in needs(self.part, "process") else Even(size)
        self.folder = tempfile.TemporaryDirectory(prefix="dmmd-conformance-")
        self.offers = {
            **vars(self.data.spec),
            "data": self.data,
            "codec": self.data.codec,
            "process": self.process,
            "seed": 0,
            "cache_directory": Path(self.folder.name),
        }

    def close(self) -> None:
        """See `Case.close`."""
        self.folder.cleanup()

    def ready(self) -> Metric:
        """The metric, prepared."""
        metric: Metric = self.component
        if -1 not in self.made:
            self.made[-1] = metric.prepare()
        return metric

    def subject(self, model: str, *, num: int = _NUM, repeated: bool = False, noise: bool = False) -> Subject:
        """Something to judge: real tokens, one sequence again and again, or noise under real labels."""
        split = "train" if model == "train" else "test"
        size, spec = self.data.size(split), self.data.spec
        batch = self.data.take(split, torch.zeros(num, dtype=torch.int64) if repeated else torch.arange(num) % size)
        if noise:
            tokens = Draws.for_range(0, 0, 0, num).integers("noise", spec.vocab_size, (spec.length,))
            batch = Batch(tokens, batch.labels)
        made = model in ("student", "teacher")
        data = self.data
        exact = Enumerating(self.process, data) if made and isinstance(data, EnumerableData) else None
        return Subject(
            model=model,
            num_steps=4 if made else 0,
            tokens=batch.tokens.clone(),
            labels=batch.labels,
            denoiser=exact,
            sampler=_OneStep(self.process, self.data) if made else None,
            process=self.process,
            draws=Draws.for_range(0, 0, 0, 1).within("conformance"),
        )

    def values(self, model: str = "student", **more: Any) -> Sequence[Value]:
        """What the metric says."""
        return self.ready().evaluate(self.subject(model, **more))


@clause("facts", remedy="return a dict of str to finite float from prepare")
def facts(case: MetricCase) -> None:
    """`prepare` reports finite numbers by name."""
    case.ready()
    told = case.made[-1]
    expect(isinstance(told, dict), f"prepare() gives {told!r}")
    for name, value in told.items():
        expect(isinstance(name, str) and math.isfinite(value), f"prepare() says {name!r}: {value!r}")


@clause("values", remedy="return Value(name, float(...), standard_error, reference, num_samples)")
def values(case: MetricCase) -> None:
    """Figures are Values with finite floats, errors that are not negative, and names of their own."""
    got = case.values()
    expect(isinstance(got, Sequence) and all(isinstance(value, Value) for value in got), f"evaluate gives {got!r}")
    for value in got:
        expect(value.metric.isidentifier(), f"the figure is called {value.metric!r}; use letters, numerals, _")
        expect(type(value.value) is float, f"{value.metric} is {type(value.value).__name__}, expected float")
        expect(math.isfinite(value.value), f"{value.metric} is {value.value}")
        error = value.standard_error
        expect(error is None or (math.isfinite(error) and error >= 0), f"the error of {value.metric} is {error}")
        expect(isinstance(value.num_samples, int) and value.num_samples >= 0, f"num_samples is {value.num_samples!r}")
    names = [value.metric for value in got]
    expect(len(set(names)) == len(names), f"two figures have one name: {', '.join(names)}")
    for value in got:
        json.dumps(dataclasses.asdict(value))


@clause("repeatable", remedy="draw from subject.draws, and keep nothing of one subject for the next")
def repeatable(case: MetricCase) -> None:
    """The same subject gets the same figures, whatever was judged in between."""
    first = case.values()
    case.values("teacher", repeated=True)
    again = case.values()
    for one, two in zip(first, again, strict=True):
        expect(one == two, f"{one.metric} was {one.value} and is {two.value} when asked again")


@clause("yardsticks", remedy="return an empty list, or judge the tokens alone, where denoiser and sampler are None")
def yardsticks(case: MetricCase) -> None:
    """Real data are judged too: a subject without denoiser and sampler, in 0 steps."""
    for model in ("train", "test"):
        for value in case.values(model):
            expect(math.isfinite(value.value), f"{value.metric} of the yardstick {model} is {value.value}")


@clause("few_samples", remedy="return an empty list where there are too few samples")
def few_samples(case: MetricCase) -> None:
    """A single sample gives finite figures, or none."""
    for value in case.values(num=1):
        expect(math.isfinite(value.value), f"{value.metric} of one sample is {value.value}")
        error = value.standard_error
        expect(error is None or math.isfinite(error), f"the error of {value.metric} of one sample is {error}")


@clause("untouched", remedy="copy the tokens before changing them")
def untouched(case: MetricCase) -> None:
    """Tokens and labels of the subject are not changed."""
    subject = case.subject("student")
    before = subject.tokens.clone(), None if subject.labels is None else subject.labels.clone()
    case.ready().evaluate(subject)
    expect(torch.equal(subject.tokens, before[0]), "evaluate changed the subject's tokens")
    same = subject.labels is None or (before[1] is not None and torch.equal(subject.labels, before[1]))
    expect(same, "evaluate changed the subject's labels")


@clause("looks", remedy="compute the figure from subject.tokens, or declare num_samples = 0 where it is not sampled")
def looks(case: MetricCase) -> None:
    """A figure that rests on samples is another one for real data than for a repeated sequence, or for noise."""
    good = case.values()
    if not any(value.num_samples for value in good):
        raise Skip("its figures rest on no samples, or there were none to judge")
    found = [value.value for value in good]
    same = all(found == [value.value for value in bad] for bad in (case.values(repeated=True), case.values(noise=True)))
    expect(not same, "one sequence repeated, and noise, get the same figures as real data")


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, facts, values, repeatable, yardsticks, few_samples, untouched, looks,
)  # fmt: skip
