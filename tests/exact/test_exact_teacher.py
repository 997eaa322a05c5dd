"""The exact teacher against brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from worlds import make_process, naive_mean

from dmmd_codecs.integers import Integers
from dmmd_core import EnumerableData
from dmmd_data.enumerable import MarkovChain, Mixture, TiedCoins
from dmmd_teachers.exact import Exact

CODEC = Integers(Integers.Config())
WORLDS: dict[str, EnumerableData] = {
    "coins": TiedCoins(TiedCoins.Config(coins=3), codec=CODEC),
    "chain": MarkovChain(MarkovChain.Config(letters=3, length=3), codec=CODEC),
    "mixture": Mixture(Mixture.Config(), codec=CODEC),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_exact_teacher_is_the_sum_over_all_sequences(world: str, name: str) -> None:
    data = WORLDS[world]
    process = make_process(name, data.spec.vocab_size, "cosine")
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    probabilities = data.probabilities()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-12)
    for time in (0.05, 0.5, 0.99):
        states = list(itertools.product(range(process.num_inputs), repeat=3))
        z = torch.tensor(states)
        t = torch.full((len(states),), time, dtype=torch.float64)
        given = teacher(z, t).log_probs().exp().reshape(len(states), 3, -1)
        for row, state in enumerate(states):
            expected = naive_mean(process, probabilities, 3, torch.tensor(state), time)
            if bool(expected.isfinite().all()):  # noisy sequences that this world cannot make have no mean
                assert torch.allclose(given[row], expected, rtol=0, atol=1e-10), (state, time)


def test_sequences_outside_the_support_still_get_probabilities() -> None:
    data = WORLDS["coins"]
    process = make_process("masked", 2)
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    given = teacher(torch.tensor([[0, 1, 2]]), torch.tensor([0.5], dtype=torch.float64)).log_probs().exp()
    assert torch.allclose(given.sum(-1), torch.ones(3, dtype=torch.float64))
    assert given[2].tolist() == [0.5, 0.5]


def test_worlds_are_what_they_say() -> None:
    coins = WORLDS["coins"].probabilities()
    assert coins.tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0.5]
    chain = WORLDS["chain"].probabilities().reshape(3, 3, 3)
    first = chain.sum((1, 2))
    assert torch.allclose(first, torch.full((3,), 1 / 3, dtype=torch.float64))
    rows = chain.sum(2) / first.unsqueeze(1)
    assert torch.allclose(chain, first.reshape(3, 1, 1) * rows.unsqueeze(2) * rows.unsqueeze(0), rtol=1e-12)


def test_training_examples_follow_the_probabilities() -> None:
    from dmmd_core import Draws

    data = WORLDS["chain"]
    tokens = data.training_batch(Draws.for_range(0, 0, 0, 40_000)).tokens
    codes = tokens @ torch.tensor([9, 3, 1])
    probs = data.probabilities()
    bound = 6 * (40_000 * probs * (1 - probs)).sqrt() + 1e-6  # six standard deviations of a binomial count
    assert bool(((codes.bincount(minlength=27) - 40_000 * probs).abs() <= bound).all())
