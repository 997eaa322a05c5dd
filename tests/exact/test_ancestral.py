"""Ancestral sampling: exact propagation, and draws that follow it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import make_process

from dmmd_codecs.integers import Integers
from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    EnumerableData,
    Prediction,
    ShapedDenoiser,
    TablePrediction,
    UnsupportedError,
)
from dmmd_data.enumerable import MarkovChain, TiedCoins
from dmmd_metrics.product_bound import best_product
from dmmd_processes.masked import Masked
from dmmd_samplers.ancestral import Ancestral
from dmmd_samplers.block import Block
from dmmd_teachers.exact import Exact

CODEC = Integers(Integers.Config())


def _setup(name: str, data: EnumerableData, **params: Any) -> tuple[Ancestral, Denoiser]:
    process = make_process(name, data.spec.vocab_size)
    sampler = Ancestral(Ancestral.Config(**params), process=process, length=data.spec.length)
    return sampler, Exact(Exact.Config(), process=process, data=data).denoiser()


@pytest.mark.parametrize("steps", range(1, 65))
def test_tied_coins_have_total_variation_one_over_two_k(steps: int) -> None:
    data = TiedCoins(TiedCoins.Config(), codec=CODEC)
    sampler, teacher = _setup("masked", data)
    given = sampler.distribution(teacher, num_steps=steps)
    distance = float((given - data.probabilities()).abs().sum() / 2)
    assert distance == pytest.approx(1 / (2 * steps), abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_tied_coins_in_steps_by_the_cosine(steps: int) -> None:
    """Half the probability that both are drawn in one step, ``sum_i (t_i - t_{i+1})^2 / 2``; samples follow it."""
    data = TiedCoins(TiedCoins.Config(), codec=CODEC)
    sampler, teacher = _setup("masked", data, times="cosine")
    times = [math.cos(0.5 * math.pi * step / steps) for step in range(steps + 1)]
    expected = sum((t - s) ** 2 for t, s in itertools.pairwise(times)) / 2
    given = sampler.distribution(teacher, num_steps=steps)
    assert float((given - data.probabilities()).abs().sum() / 2) == pytest.approx(expected, abs=1e-12)
    tokens = sampler.sample(teacher, Draws.for_range(0, 0, 0, 20_000), num_steps=steps).tokens
    apart = float((tokens[:, 0] != tokens[:, 1]).double().mean())  # a Bernoulli mean; six standard deviations
    assert apart == pytest.approx(expected, abs=6 * math.sqrt(expected / 20_000))
    assert Block(Block.Config(), inner=sampler, process=sampler.process, length=2).step_times(
        torch.tensor(0.5)
    ) == pytest.approx(math.sqrt(0.5))


def test_no_product_distribution_comes_nearer_to_tied_coins_than_root_two_minus_one() -> None:
    data = TiedCoins(TiedCoins.Config(), codec=CODEC)
    bound = best_product(data.probabilities(), 2, 2, starts=16, steps=1500, seed=0)
    assert float(bound) == pytest.approx(2**0.5 - 1, abs=1e-4)


class _Rounded(Denoiser):
    """A denoiser that speaks float32, whose probabilities do not sum to one in float64."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        return TablePrediction(self.inner(z_t, t).log_probs().float().unflatten(0, z_t.shape))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_denoiser_in_float32_still_has_a_distribution_that_sums_to_one(name: str) -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=3), codec=CODEC)
    sampler, teacher = _setup(name, data)
    exact = sampler.distribution(teacher, num_steps=8)
    rounded = sampler.distribution(_Rounded(teacher), num_steps=8)
    assert float(rounded.sum()) == pytest.approx(1, abs=1e-14)
    # Three positions, eight steps, relative errors of at most 2^-24 times the size of a log-probability.
    assert float((rounded - exact).abs().sum()) < 3 * 8 * 20 * 2**-24


class _Ignorant(Denoiser):
    """A denoiser that gives every token the same probability, at positions that are known as well."""

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        return TablePrediction(torch.full((*z_t.shape, 2), 0.5, dtype=torch.float64).log())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_last_log_probs_of_what_was_known_already_are_certain_whatever_the_denoiser_says(name: str) -> None:
    sampler, _ = _setup(name, TiedCoins(TiedCoins.Config(coins=3), codec=CODEC))
    fixed = torch.tensor([[False, True, False]]).expand(50, -1)
    condition = Condition(fixed=fixed, values=torch.ones(50, 3, dtype=torch.int64))
    draws = Draws.for_range(0, 0, 0, 50)
    samples = sampler.sample(_Ignorant(), draws, num_steps=2, condition=condition, last_step=True)
    assert samples.last_log_probs is not None
    probs = samples.last_log_probs.exp()
    carried = (probs == torch.nn.functional.one_hot(samples.tokens, 2)).all(-1)
    assert bool(carried[:, 1].all())
    # Masked: about half of the free positions were seen in the first of two steps. Uniform: all are drawn at the last.
    free = carried[:, [0, 2]]
    assert bool(free.any()) == (name == "masked")
    assert not bool(free.all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("steps", [1, 3])
def test_samples_follow_the_exact_distribution(name: str, steps: int) -> None:
    data = MarkovChain(MarkovChain.Config(letters=2, length=3), codec=CODEC)
    sampler, teacher = _setup(name, data)
    probs = sampler.distribution(teacher, num_steps=steps)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-10)
    count = 40_000
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=steps, last_step=True)
    counts = (samples.tokens @ torch.tensor([4, 2, 1])).bincount(minlength=8)
    assert bool(((counts - count * probs).abs() <= 6 * (count * probs * (1 - probs)).sqrt() + 1e-6).all())
    assert samples.last_log_probs is not None
    last = samples.last_log_probs.exp()
    joint = torch.einsum("na,nb,nc->abc", last[:, 0], last[:, 1], last[:, 2]).flatten() / count
    # Averaged last-step probabilities estimate the same distribution with no more noise than counting.
    assert bool(((joint - probs).abs() <= 6 * (probs * (1 - probs) / count).sqrt() + 1e-8).all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_batch_split_gives_the_same_samples(name: str) -> None:
    sampler, teacher = _setup(name, MarkovChain(MarkovChain.Config(letters=3, length=4, sharpness=1), codec=CODEC))
    whole = sampler.sample(teacher, Draws.for_range(0, 0, 0, 20), num_steps=4).tokens
    parts = [sampler.sample(teacher, Draws.for_range(0, 0, i, 5), num_steps=4).tokens for i in (0, 5, 10, 15)]
    assert torch.equal(whole, torch.cat(parts))
    assert len(whole.unique(dim=0)) > 5, "samples differ"


def test_chunked_logits_change_nothing() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=4), codec=CODEC)
    sampler, teacher = _setup("masked", data)
    chunked = Ancestral(Ancestral.Config(chunk_rows=7), process=sampler.process, length=4)
    draws = Draws.for_range(0, 0, 0, 20)
    first, second = (one.sample(teacher, draws, num_steps=3).tokens for one in (sampler, chunked))
    assert torch.equal(first, second)


def test_without_a_number_of_rows_a_budget_of_logits_is_kept() -> None:
    for vocab_size, rows in ((3, 2**27 // 3), (50_257, 2670)):
        process = make_process("masked", vocab_size)
        sampler = Ancestral(Ancestral.Config(), process=process, length=4)
        assert sampler.chunk_rows == rows
    assert Ancestral(Ancestral.Config(chunk_rows=7), process=process, length=4).chunk_rows == 7


class _Asked(Prediction):
    """A prediction that notes which rows of the whole batch it is asked for."""

    def __init__(self, inner: Prediction, samples: Tensor, length: int, asked: list[Tensor]) -> None:
        self._inner = inner
        self._samples, self._length, self._asked = samples, length, asked
        self.num_rows, self.vocab_size = inner.num_rows, inner.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        assert rows is not None, "all rows were asked for"
        self._asked.append(self._samples[rows // self._length] * self._length + rows % self._length)
        return self._inner.log_probs(rows)


class _Asking(Denoiser):
    """A denoiser that notes every step's rows and samples; labels tell it the samples."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.steps: list[list[Tensor]] = []
        self.shown: list[Tensor] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert condition is not None
        assert condition.label is not None
        self.steps.append([])
        self.shown.append(condition.label)
        prediction = self.inner(z_t, t, dataclasses.replace(condition, label=None))
        return _Asked(prediction, condition.label, z_t.shape[1], self.steps[-1])


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_logits_are_made_only_for_rows_about_to_be_drawn(name: str, chunk: int) -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=4), codec=CODEC)
    _, teacher = _setup(name, data)
    denoiser = _Asking(teacher)
    sampler = Ancestral(Ancestral.Config(chunk_rows=chunk, top_p=0.9), process=make_process(name, 3), length=4)
    fixed = torch.zeros(20, 4, dtype=torch.bool).index_fill_(1, torch.tensor([2]), True)
    condition = Condition(label=torch.arange(20), fixed=fixed, values=torch.ones(20, 4, dtype=torch.int64))
    sampler.sample(denoiser, Draws.for_range(0, 0, 0, 20), num_steps=5, condition=condition)
    free = (~fixed).flatten().nonzero().squeeze(-1).tolist()
    asked = [torch.cat(parts).tolist() if parts else [] for parts in denoiser.steps]
    assert len(asked) == 5
    if name == "masked":  # a position is drawn once in all, at the step that shows it
        assert sorted(row for rows in asked for row in rows) == free
        assert sum(map(bool, asked)) > 1
    else:
        assert asked == [free] * 5
    assert max(len(part) for parts in denoiser.steps for part in parts) <= (chunk or len(free))


class _AllRows(Masked):
    """The masked process, which cannot tell what its draws will look at."""

    def rows_to_draw(self, z_t: Tensor, s: Tensor, t: Tensor, draws: Draws) -> Tensor:
        return ~self.known(z_t, t)


def test_a_sample_of_which_nothing_is_drawn_is_not_shown_to_the_network() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=4), codec=CODEC)
    sampler, teacher = _setup("masked", data)
    denoiser, draws = _Asking(teacher), Draws.for_range(0, 0, 0, 50)
    condition = Condition(label=torch.arange(50))
    found = sampler.sample(denoiser, draws, num_steps=64, condition=condition).tokens
    for samples, parts in zip(denoiser.shown, denoiser.steps, strict=True):
        drawn = torch.cat(parts) // 4
        assert samples.tolist() == drawn.unique().tolist()
    shown = sum(map(len, denoiser.shown))
    assert 50 <= shown <= 50 * 4, "at most one call for every token"
    ignorant = _AllRows(Masked.Config(), vocab_size=3, schedule=sampler.process.schedule)
    asking = Ancestral(Ancestral.Config(), process=ignorant, length=4)
    everything = _Asking(teacher)
    assert torch.equal(asking.sample(everything, draws, num_steps=64, condition=condition).tokens, found)
    assert sum(map(len, everything.shown)) > 3 * shown


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_fixed_positions_stay_and_condition_the_rest(name: str) -> None:
    data = TiedCoins(TiedCoins.Config(coins=3), codec=CODEC)
    sampler, teacher = _setup(name, data)
    fixed = torch.tensor([[False, True, False]]).expand(2000, -1)
    values = torch.ones(2000, 3, dtype=torch.int64)
    condition = Condition(fixed=fixed, values=values)
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, 2000), num_steps=2, condition=condition).tokens
    assert bool((samples[:, 1] == 1).all())
    assert bool((samples == 1).all()), "one coin known, the exact teacher knows the others for certain"


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_single_free_position_follows_the_conditional_distribution(name: str) -> None:
    """One free position has no correlation to lose, so that any number of steps is exact."""
    data = MarkovChain(MarkovChain.Config(letters=3, length=3, sharpness=1.0), codec=CODEC)
    sampler, teacher = _setup(name, data)
    count = 20_000
    fixed = torch.tensor([[True, False, True]]).expand(count, -1)
    values = torch.tensor([[2, 0, 1]]).expand(count, -1)
    condition = Condition(fixed=fixed, values=values)
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=3, condition=condition).tokens
    assert torch.equal(samples[:, [0, 2]], values[:, [0, 2]])
    probs = data.probabilities().reshape(3, 3, 3)[2, :, 1]
    probs = probs / probs.sum()
    bound = 6 * (count * probs * (1 - probs)).sqrt()  # six standard deviations of a binomial count
    assert bool(((samples[:, 1].bincount(minlength=3) - count * probs).abs() <= bound).all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_last_log_probs_are_those_that_the_tokens_were_drawn_from(name: str) -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=4), codec=CODEC)
    sampler, teacher = _setup(name, data)
    count = 20_000
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=3, last_step=True)
    assert samples.last_log_probs is not None
    assert samples.last_log_probs.shape == (count, 4, 3)
    probs = samples.last_log_probs.exp()
    drawn = torch.nn.functional.one_hot(samples.tokens, 3).double()
    assert bool((probs[drawn.bool()] > 0).all())
    residual = (drawn - probs).flatten(0, 1)
    variance = (probs * (1 - probs)).flatten(0, 1)
    # Given its probabilities a token is an independent draw: calibrated overall and where one token is the likeliest.
    for part in (slice(None), probs.flatten(0, 1).argmax(-1) == 0, probs.flatten(0, 1).argmax(-1) == 2):
        assert bool((residual[part].sum(0).abs() <= 6 * variance[part].sum(0).sqrt()).all())
    assert sampler.sample(teacher, Draws.for_range(0, 0, 0, 2), num_steps=3).last_log_probs is None


def test_too_large_a_world_is_refused() -> None:
    data = MarkovChain(MarkovChain.Config(letters=5, length=6), codec=CODEC)
    sampler, teacher = _setup("masked", data)
    with pytest.raises(UnsupportedError, match="too many to enumerate"):
        sampler.distribution(teacher, num_steps=1)


def test_shaping_at_sampling_time_is_that_of_a_shaped_denoiser() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=3), codec=CODEC)
    sampler, teacher = _setup("masked", data)
    config = Ancestral.Config(temperature=0.7, top_p=0.8, top_p_lowering=2.0)
    shaping = Ancestral(config, process=sampler.process, length=3)
    shaped = ShapedDenoiser(teacher, temperature=0.7, top_p=0.8, lowering=2.0)
    draws = Draws.for_range(0, 0, 0, 200)
    assert torch.equal(
        shaping.sample(teacher, draws, num_steps=2).tokens, sampler.sample(shaped, draws, num_steps=2).tokens
    )
    assert torch.allclose(shaping.distribution(teacher, num_steps=2), sampler.distribution(shaped, num_steps=2))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_nucleus_without_lowering_leaves_nothing_outside(name: str) -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=3), codec=CODEC)
    _, teacher = _setup(name, data)
    greedy = Ancestral(Ancestral.Config(top_p=1e-3), process=make_process(name, 3), length=3)
    samples = greedy.sample(teacher, Draws.for_range(0, 0, 0, 50), num_steps=1, last_step=True)
    assert samples.last_log_probs is not None
    assert torch.allclose(samples.last_log_probs.exp().amax(-1), torch.ones((), dtype=torch.float64))
