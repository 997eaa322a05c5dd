"""The exact teacher against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from worlds import forward_matrix, make_process, naive_mean

from dmmd_codecs.integers import Integers
from dmmd_core import Draws, EnumerableData
from dmmd_data.enumerable import MarkovChain, Mixture, TiedCoins
from dmmd_teachers.exact import Exact

CODEC = Integers(Integers.Config())
WORLDS: dict[str, EnumerableData] = {
    "coins": TiedCoins(TiedCoins.Config(coins=3), codec=CODEC),
    "chain": MarkovChain(MarkovChain.Config(letters=3, length=3), codec=CODEC),
    "mixture": Mixture(Mixture.Config(), codec=CODEC),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["masked", "uniform", "skewed"])
def test_exact_teacher_is_the_sum_over_all_sequences(world: str, name: str) -> None:
    data = WORLDS[world]
    process = make_process(name, data.spec.vocab_size, "cosine")
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    probabilities = data.probabilities()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    compared = 0
    for time in (0.05, 0.5, 0.99):
        states = list(itertools.product(range(process.num_inputs), repeat=3))
        z = torch.tensor(states)
        t = torch.full((len(states),), time, dtype=torch.float64)
        given = teacher(z, t).log_probs().exp().reshape(len(states), 3, -1)
        for row, state in enumerate(states):
            expected = naive_mean(process, probabilities, 3, torch.tensor(state), time)
            if bool(expected.isfinite().all()):  # noisy sequences that this world cannot make have no mean
                assert torch.allclose(given[row], expected, rtol=0, atol=1e-12), (state, time)
                compared += 1
    # Three coins: 27 states with [MASK], of which 12 show both sides; everywhere else all states are possible.
    possible = 15 if (world, name) == ("coins", "masked") else process.num_inputs**3
    assert compared == 3 * possible


def test_sequences_outside_the_support_still_get_probabilities() -> None:
    data = WORLDS["coins"]
    ones = torch.ones(3, dtype=torch.float64)
    for name, time in (("masked", 0.5), ("masked", 0.0), ("uniform", 0.0)):
        process = make_process(name, 2)
        teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
        t = torch.tensor([time], dtype=torch.float64)
        for z in ([0, 1, 1], [0, 1, 0]):  # both sides of a coin at once: the nearest sequences win
            given = teacher(torch.tensor([z]), t).log_probs().exp()
            assert torch.allclose(given.sum(-1), ones, rtol=0, atol=1e-14)
            assert torch.allclose(given[:, int(sum(z) > 1)], ones, rtol=0, atol=1e-14)
    teacher = Exact(Exact.Config(), process=make_process("masked", 2), data=data).denoiser()
    given = teacher(torch.tensor([[0, 1, 2]]), torch.tensor([0.5], dtype=torch.float64)).log_probs().exp()
    assert torch.allclose(given[2], ones[:2] / 2, rtol=0, atol=1e-14)
    given = teacher(torch.tensor([[2, 2, 2]]), torch.tensor([0.0], dtype=torch.float64)).log_probs().exp()
    assert torch.allclose(given, torch.full_like(given, 0.5), rtol=0, atol=1e-14), "[MASK] is no token, at no time"


@pytest.mark.parametrize("name", ["masked", "uniform", "skewed"])
def test_every_position_may_have_a_time_of_its_own(name: str) -> None:
    data = WORLDS["chain"]
    process = make_process(name, 3)
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    times = [0.9, 0.0, 0.4]
    forward = [forward_matrix(process, 0.0, time) for time in times]
    for z in ([0, 1, 2], [process.num_inputs - 1, 2, 1]):
        likelihood = torch.stack([forward[i][data.sequences()[:, i], z[i]] for i in range(3)]).prod(0)
        weights = data.probabilities() * likelihood
        expected = torch.stack(
            [torch.zeros(3, dtype=torch.float64).index_add(0, data.sequences()[:, i], weights) for i in range(3)]
        )
        given = teacher(torch.tensor([z]), torch.tensor([times], dtype=torch.float64)).log_probs().exp()
        assert torch.allclose(given, expected / weights.sum(), rtol=0, atol=1e-12)


def test_worlds_are_what_they_say() -> None:
    coins = WORLDS["coins"].probabilities()
    assert coins.tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0.5]
    chain = WORLDS["chain"].probabilities().reshape(3, 3, 3)
    first = chain.sum((1, 2))
    assert torch.allclose(first, torch.full((3,), 1 / 3, dtype=torch.float64))
    rows = chain.sum(2) / first.unsqueeze(1)
    assert torch.allclose(chain, first.reshape(3, 1, 1) * rows.unsqueeze(2) * rows.unsqueeze(0), rtol=1e-12)
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(rows, (3 * logits).softmax(-1), rtol=1e-12), "row a holds the transitions out of a"
    mixture = WORLDS["mixture"].probabilities().reshape(3, 3, 3)
    # Three product distributions: as a matrix the first letter against the other two has rank three at most, and the
    # mean of products is no product.
    product = torch.einsum("a,b,c->abc", mixture.sum((1, 2)), mixture.sum((0, 2)), mixture.sum((0, 1)))
    assert float((mixture - product).abs().sum() / 2) > 0.1


def test_training_examples_follow_the_probabilities() -> None:
    data = WORLDS["chain"]
    tokens = data.training_batch(Draws.for_range(0, 0, 0, 40_000)).tokens
    codes = tokens @ torch.tensor([9, 3, 1])
    probs = data.probabilities()
    bound = 6 * (40_000 * probs * (1 - probs)).sqrt() + 1e-6  # six standard deviations of a binomial count
    assert bool(((codes.bincount(minlength=27) - 40_000 * probs).abs() <= bound).all())
