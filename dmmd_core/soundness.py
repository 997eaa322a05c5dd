"""What components hand over is looked at before it is kept: tokens that do not exist, figures that are no numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.errors import RunError
from dmmd_core.interfaces import Batch, Condition, DataSpec, Denoiser, Prediction, Sampler, Samples, Value

_KEPT = "what was finished is kept, and the same command goes on from there"


def check_batch(batch: Batch, spec: DataSpec, count: int, who: str, *, values: bool = True) -> None:
    """Refuse examples that the data's own sizes do not allow.

    Args:
        batch: The examples.
        spec: Sizes of the data.
        count: How many were asked for.
        who: Whose they are, the start of the message.
        values: Also look at the numbers themselves, for which an accelerator has to be waited for.

    Raises:
        RunError: Tokens or labels are of another type or shape, or out of range.
    """
    problem = _problem(batch.tokens, (count, spec.length), spec.vocab_size, values)
    if problem:
        raise RunError(f"{who}: the tokens {problem}; mend that component: {_KEPT}")
    if batch.labels is not None and spec.num_classes is not None:
        problem = _problem(batch.labels, (count,), spec.num_classes, values)
        if problem:
            raise RunError(f"{who}: the labels {problem}; mend that component: {_KEPT}")


def check_values(values: Sequence[Value], who: str, subject: str) -> None:
    """Refuse figures, and standard errors, that are not finite.

    Raises:
        RunError: Names the metric, the figure and what was judged.
    """
    for value in values:
        numbers = {"": value.value, " (standard error)": value.standard_error}
        for what, number in numbers.items():
            if number is not None and not math.isfinite(number):
                raise RunError(
                    f"metric {who}: {value.metric}{what} of {subject} is {number}, and no such figure is kept; look at "
                    f"the samples and mend the metric: {_KEPT}"
                )


def check_facts(facts: Mapping[str, float], who: str) -> None:
    """Refuse facts about data or metrics that are not finite.

    Raises:
        RunError: Names the component and the fact.
    """
    for name, number in facts.items():
        if not math.isfinite(number):
            raise RunError(f"{who}: the fact {name} is {number}, and no such figure is kept; mend it: {_KEPT}")


class CheckedSampler(Sampler):
    """A sampler whose predictions must be numbers, and whose tokens must exist.

    Args:
        inner: The sampler.
        name: Its name in the recipe.
        model: What it samples, ``teacher`` or ``student``.
        spec: Sizes of the data.
    """

    def __init__(self, inner: Sampler, name: str, model: str, spec: DataSpec) -> None:
        self.inner = inner
        self.who = f"sampler {name}"
        self.model = model
        self.spec = spec

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
        """See `Sampler.sample`.

        Raises:
            RunError: A prediction was not a number, or a token does not exist.
        """
        watch = _Watch()
        handle = denoiser.register_forward_hook(watch)
        try:
            samples = self.inner.sample(
                denoiser, draws, num_steps=num_steps, condition=condition, last_step=last_step, length=length
            )
        finally:
            handle.remove()
        if watch.saw_nan():
            raise RunError(
                f"{self.who}: predictions of the {self.model} are not numbers (NaN) at {num_steps} steps, and samples "
                f"drawn from them are not kept; look at the network of the {self.model}: {_KEPT}"
            )
        shape = (draws.batch, length or self.spec.length)
        if problem := _problem(samples.tokens, shape, self.spec.vocab_size, values=True):
            raise RunError(
                f"{self.who}: the tokens of the {self.model} at {num_steps} steps {problem}; mend that sampler: {_KEPT}"
            )
        return samples

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """See `Sampler.prepared`."""
        return self.inner.prepared(denoiser)

    def step_times(self, left: Tensor) -> Tensor:
        """See `Sampler.step_times`."""
        return self.inner.step_times(left)

    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> Tensor:
        """See `Sampler.distribution`."""
        return self.inner.distribution(denoiser, num_steps=num_steps, context=context, length=length)


class _Watch:
    """A forward hook that looks at all log-probabilities made; the answer is waited for once."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def __call__(self, module: Any, arguments: Any, prediction: Any) -> Any:
        return _WatchedPrediction(prediction, self) if isinstance(prediction, Prediction) else prediction

    def look(self, log_probs: Tensor) -> Tensor:
        """Note whether a row holds NaN, which a maximum passes on; minus infinity is a probability of zero."""
        if log_probs.numel():
            found = log_probs.amax(-1).isnan().any()
            self._seen = found if self._seen is None else self._seen | found
        return log_probs

    def saw_nan(self) -> bool:
        """Whether any of them was NaN."""
        return self._seen is not None and bool(self._seen)


class _WatchedPrediction(Prediction):
    """A prediction whose log-probabilities are looked at as they are made."""

    def __init__(self, inner: Prediction, watch: _Watch) -> None:
        self._inner, self._watch = inner, watch
        self.num_rows, self.vocab_size = inner.num_rows, inner.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return self._watch.look(self._inner.log_probs(rows))

    def sources(self) -> tuple[Tensor, ...]:
        """See `Prediction.sources`."""
        return self._inner.sources()

    def from_sources(self, rows: Tensor, sources: Sequence[Tensor]) -> Prediction:
        """See `Prediction.from_sources`."""
        return _WatchedPrediction(self._inner.from_sources(rows, sources), self._watch)


def _problem(numbers: Tensor, shape: tuple[int, ...], upper: int, values: bool) -> str:
    """What is wrong with whole numbers of a shape in 0..upper - 1; empty where nothing is."""
    if numbers.dtype != torch.int64 or tuple(numbers.shape) != shape:
        return f"must be int64 of shape {list(shape)}, got {str(numbers.dtype)[6:]} of shape {list(numbers.shape)}"
    if values and numbers.numel():
        low, high = (int(number) for number in numbers.aminmax())
        if low < 0 or high >= upper:
            return f"must be in 0..{upper - 1}, got {low if low < 0 else high}"
    return ""
