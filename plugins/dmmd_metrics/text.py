"""Metrics of text through a reference language model, and n-gram statistics without one."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dmmd_core import (
    Codec,
    Data,
    FieldError,
    LanguageModel,
    Metric,
    RunError,
    Slot,
    Subject,
    Value,
    hub_problem,
    option,
    slot,
)

_KEPT_BYTES = 2**29  # gradients of small references are kept between the two passes of the estimate


def refuse_generator_as_reference(reference: LanguageModel, denoiser: nn.Module | None) -> None:
    """Raise a `RunError` where most of the reference's parameters are found in the model that is judged."""
    if denoiser is None:
        return
    judged = {_digest(tensor) for tensor in denoiser.state_dict().values() if tensor.numel() > 1}
    parameters = [tensor for tensor in reference.module.parameters() if tensor.numel() > 1]
    total = sum(tensor.numel() for tensor in parameters)
    shared = sum(tensor.numel() for tensor in parameters if _digest(tensor) in judged)
    if 2 * shared > total:
        raise RunError(
            f"the reference language model ({reference.reference_name}) has {shared / total:.0%} of its parameters in "
            "common with the model that it should judge; its verdict would mean nothing, choose another reference"
        )


def _reference_on_the_spot(reference: Slot) -> Slot:
    """The reference of a smoke run: one that is loaded gives way to a small one trained on the run's own text."""
    if reference.name != "transformers_causal":
        return reference
    return Slot(name="causal_transformer", params={"width": 16, "depth": 1, "heads": 2, "steps": 10})


def _digest(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().flatten()
    return hashlib.sha256(str(tuple(tensor.shape)).encode() + flat.view(torch.uint8).numpy().tobytes()).digest()


class GradientMoment(Metric):
    """Gradient Moment ``|| E_samples[grad l] - E_data[grad l] ||^2`` of a reference (D-MMD, arXiv:2603.20155).

    ``l`` is the mean token negative log-likelihood. Over n pairs of batches with ``h = grad l(samples) - grad l(data)``
    the estimate ``(|sum h|^2 - sum |h|^2) / (n (n - 1))`` is unbiased; its standard error is the jackknife's. Where
    there are more samples than held-out sequences, each pair takes more of them. Two sets of gradients are in memory,
    the sum and the current pair's, unless all of them are small.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        reference: Slot = slot("language_model", "causal_transformer", help="the reference language model")
        batch_size: int = option(25, help="held-out sequences per gradient; most samples at a time", minimum=1)
        centred: bool = option(True, help="take the data's gradient off; without it, the samples' alone")

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return replace(config, reference=_reference_on_the_spot(config.reference))

    def __init__(self, config: GradientMoment.Config, *, reference: LanguageModel, data: Data) -> None:
        self.config = config
        self.reference = reference
        self.data = data

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        return self.reference.prepare()

    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`; the yardstick ``test`` is compared with itself in two halves."""
        refuse_generator_as_reference(self.reference, subject.denoiser)
        tokens = subject.tokens
        if subject.model == "test":
            half = len(tokens) // 2
            tokens, data = tokens[:half], tokens[half : 2 * half]
        else:
            data = self._data(len(tokens))
        size = self.config.batch_size
        count = min(len(tokens), len(data)) // size
        if count < 3:
            return []  # too few for an estimate and its error
        each = len(tokens) // count if len(tokens) > len(data) else size
        pairs = [(tokens[i * each : (i + 1) * each], data[i * size : (i + 1) * size]) for i in range(count)]
        parameters = sum(tensor.numel() for tensor in self.reference.module.parameters())
        if 4 * parameters * count <= _KEPT_BYTES:
            kept = list(self._differences(pairs))
            value, error = moment_and_error(lambda: iter(kept), count)
        else:  # the second pass computes every gradient again
            value, error = moment_and_error(lambda: self._differences(pairs), count)
        kind = "gradient_moment" if self.config.centred else "gradient_moment_uncentred"
        return [Value(kind, value, error, f"test; {self.reference.reference_name}", count * each)]

    def _data(self, num: int) -> Tensor:
        size = self.data.size("test")
        generator = torch.Generator().manual_seed(0)  # the same data for every model that is judged
        return self.data.take("test", torch.randperm(size, generator=generator)[:num]).tokens

    def _differences(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[Tensor]]:
        parameters = [tensor for tensor in self.reference.module.parameters() if tensor.requires_grad]
        for samples, data in pairs:
            self.reference.module.zero_grad()  # its training may have left gradients
            counted = torch.zeros((), device=parameters[0].device)
            for part in samples.split(self.config.batch_size):
                losses, counts = self.reference.losses(part)
                losses.sum().backward(inputs=parameters)
                counted += counts.sum()
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.div_(counted)
            if self.config.centred:
                losses, counts = self.reference.losses(data)
                (-losses.sum() / counts.sum()).backward(inputs=parameters)
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            self.reference.module.zero_grad()
            yield gradients


def moment_and_error(vectors: Any, count: int) -> tuple[float, float]:
    """Unbiased estimate of ``|E h|^2`` from independent h, and its jackknife standard error.

    Args:
        vectors: A function that gives an iterator over the h, each a list of tensors; called twice.
        count: Number of h, at least 3.

    Returns:
        The estimate ``(|S|^2 - Q) / (n (n - 1))``, ``S = sum h``, ``Q = sum |h|^2``, and its standard error.
    """
    total: list[Tensor] = []
    for h in vectors():
        total = [part.clone() for part in h] if not total else [a.add_(b) for a, b in zip(total, h, strict=True)]
    squares, products = [], []
    for h in vectors():
        squares.append(sum(float(part.double().square().sum()) for part in h))
        products.append(sum(float((a.double() * b.double()).sum()) for a, b in zip(h, total, strict=True)))
    square, own = sum(float(part.double().square().sum()) for part in total), sum(squares)
    value = (square - own) / (count * (count - 1))
    left_out = [
        (square - 2 * product + 2 * mine - own) / ((count - 1) * (count - 2))
        for product, mine in zip(products, squares, strict=True)
    ]
    mean = sum(left_out) / count
    return value, math.sqrt((count - 1) / count * sum((one - mean) ** 2 for one in left_out))


class GenerativePerplexity(Metric):
    """Exponential of the mean token negative log-likelihood under the reference; praises repetition."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        reference: Slot = slot("language_model", "causal_transformer", help="the reference language model")
        batch_size: int = option(50, help="sequences at a time", minimum=1)

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return replace(config, reference=_reference_on_the_spot(config.reference))

    def __init__(self, config: GenerativePerplexity.Config, *, reference: LanguageModel) -> None:
        self.config = config
        self.reference = reference

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`."""
        return self.reference.prepare()

    @torch.no_grad()
    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`; standard error by the delta method over sequences."""
        refuse_generator_as_reference(self.reference, subject.denoiser)
        parts = [self.reference.losses(part) for part in subject.tokens.split(self.config.batch_size)]
        losses = torch.cat([part[0] for part in parts]).double()
        counts = torch.cat([part[1] for part in parts]).double()
        mean = losses.sum() / counts.sum()
        residual = losses - mean * counts
        value = float(mean.exp())
        error = value * float(residual.square().sum().sqrt() / counts.sum()) if len(losses) > 1 else None
        return [Value("generative_perplexity", value, error, self.reference.reference_name, len(losses))]


class NgramDivergence(Metric):
    """Jensen-Shannon divergence, in nats, between the samples' and the test split's unigrams and bigrams.

    Between 0 and ln 2. Counts are not smoothed, so that finite samples of one distribution stay above 0: compare with
    the yardsticks ``train`` and ``test`` (its two halves) at the same number of samples.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        max_sequences: int = option(20_000, help="most sequences of the test split", minimum=2)

    def __init__(self, config: NgramDivergence.Config, *, data: Data, vocab_size: int) -> None:
        self.config = config
        self.data = data
        self.vocab_size = vocab_size

    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`."""
        tokens = subject.tokens
        if subject.model == "test":
            half = len(tokens) // 2
            tokens, data = tokens[:half], tokens[half:]
        else:
            rows = torch.arange(min(self.data.size("test"), self.config.max_sequences))
            data = self.data.take("test", rows).tokens
        bigrams = [(part[:, :-1] * self.vocab_size + part[:, 1:]).flatten() for part in (tokens, data)]
        return [
            Value("unigram_divergence", jensen_shannon(tokens.flatten(), data.flatten()), None, "test", len(tokens)),
            Value("bigram_divergence", jensen_shannon(*bigrams), None, "test", len(tokens)),
        ]


def jensen_shannon(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence in nats between the frequencies of two lists of ids, int64 each."""
    _, places = torch.cat((first, second)).unique(return_inverse=True)
    size = int(places.max()) + 1
    p, q = (
        places[: len(first)].bincount(minlength=size).double(),
        places[len(first) :].bincount(minlength=size).double(),
    )
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    return float((torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nansum() / 2)


class Mauve(Metric):
    """MAUVE (Pillutla et al., arXiv:2102.01454) through the package ``mauve-text``."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        model: str = option("gpt2-large", help="model of transformers whose features are compared: folder or hub name")
        max_text_length: int = option(1024, help="most tokens of that model per text", minimum=1)
        batch_size: int = option(8, help="texts at a time", minimum=1)

    def __init__(self, config: Mauve.Config, *, data: Data, codec: Codec) -> None:
        self.config = config
        self.data = data
        self.codec = codec

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse where the package is missing, or the model out of reach."""
        if find_spec("mauve") is None:
            raise FieldError("", "metric mauve needs the package mauve-text; pip install mauve-text, or leave it out")
        if "gpt2" not in config.model and "bert" not in config.model:
            raise FieldError("model", f"must have gpt2 or bert in its name for mauve-text, got {config.model!r}")
        problem = hub_problem(config.model, "config.json")
        if problem:
            raise FieldError("model", problem)

    def evaluate(self, subject: Subject) -> Sequence[Value]:
        """See `Metric.evaluate`; the yardstick ``test`` is compared with itself in two halves."""
        import mauve

        if self.codec.media != "text":
            raise RunError(f"metric mauve compares texts, but the data's codec gives {self.codec.media}")
        tokens = subject.tokens
        if subject.model == "test":
            half = len(tokens) // 2
            tokens, data = tokens[:half], tokens[half : 2 * half]
        else:
            num = min(len(tokens), self.data.size("test"))
            tokens, data = tokens[:num], self.data.take("test", torch.arange(num)).tokens
        weight = next(iter(subject.denoiser.parameters()), None) if subject.denoiser is not None else None
        device_id = (weight.device.index or 0) if weight is not None and weight.is_cuda else -1
        result = mauve.compute_mauve(
            p_text=self.codec.decode(data),
            q_text=self.codec.decode(tokens),
            featurize_model_name=self.config.model,
            max_text_length=self.config.max_text_length,
            batch_size=self.config.batch_size,
            device_id=device_id,
            verbose=False,
        )
        value = float(result.mauve)
        return [Value("mauve", value, None, f"test; {self.config.model}", len(tokens), lower_is_better=False)]
