"""Randomness: known answers, independence of the batch, exact tails."""

from __future__ import annotations

import math

import pytest
import torch

from dmmd_core import draws as draws_module
from dmmd_core.draws import Draws, categorical_from_uniform, philox_4x32

# Known answers of Philox-4x32-10, from the Random123 distribution's kat_vectors.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox_4x32((c0, c1, c2, c3), key)) == words


def test_a_sample_has_the_same_noise_in_any_batch() -> None:
    whole = Draws.for_range(3, 7, 0, 10).uniform("x", (5, 3))
    parts = torch.cat([Draws.for_range(3, 7, start, 5).uniform("x", (5, 3)) for start in (0, 5)])
    shuffled = torch.tensor([9, 0, 4])
    assert torch.equal(whole, parts)
    assert torch.equal(whole[shuffled], Draws(3, 7, shuffled).uniform("x", (5, 3)))
    assert torch.equal(whole[shuffled], Draws.for_range(3, 7, 0, 10).select(shuffled).uniform("x", (5, 3)))


def test_a_sample_has_the_same_start_at_any_length() -> None:
    draws = Draws.for_range(0, 0, 0, 4)
    assert torch.equal(draws.uniform("x", (9,))[:, :4], draws.uniform("x", (4,)))


def test_seed_step_stream_scope_and_sample_all_matter() -> None:
    draws = Draws.for_range(0, 0, 0, 2)
    others = [
        Draws.for_range(1, 0, 0, 2).uniform("x"),
        Draws.for_range(0, 1, 0, 2).uniform("x"),
        Draws.for_range(0, 0, 2, 2).uniform("x"),
        Draws.for_range(0, 0, 2**40, 2).uniform("x"),
        draws.uniform("y"),
        draws.within("a").uniform("x"),
        draws.at_step(1).within("a").uniform("x"),
    ]
    values = torch.stack([draws.uniform("x"), *others]).flatten()
    assert len(values.unique()) == len(values)
    assert torch.equal(draws.at_step(0).uniform("x"), draws.uniform("x"))


def test_scopes_nest_and_survive_other_changes() -> None:
    draws = Draws.for_range(0, 0, 0, 2)
    inner = draws.within("a").within("b")
    values = [one.uniform("x") for one in (draws, draws.within("a"), draws.within("b"), inner)]
    assert len(torch.cat(values).unique()) == 8
    assert torch.equal(inner.at_step(3).at_step(0).uniform("x"), inner.uniform("x"))
    assert torch.equal(inner.select(slice(1, 2)).uniform("x"), inner.uniform("x")[1:])
    assert torch.equal(draws.at_step(3).within("a").uniform("x"), draws.within("a").at_step(3).uniform("x"))


@pytest.mark.parametrize(("word", "extreme"), [(0, 2.0**-53), (0xFFFFFFFF, 1 - 2.0**-53)])
def test_the_most_extreme_words_still_give_uniforms_inside_the_interval(
    monkeypatch: pytest.MonkeyPatch, word: int, extreme: float
) -> None:
    monkeypatch.setattr(draws_module, "philox_4x32", lambda counter, key: (counter[0] * 0 + counter[1] * 0 + word,) * 4)
    values = Draws.for_range(0, 0, 0, 2).uniform("x", (3,))
    assert values.flatten().tolist() == [extreme] * 6
    assert bool(Draws.for_range(0, 0, 0, 2).normal("x", (3,)).isfinite().all())


def test_neighbouring_samples_steps_and_streams_are_uncorrelated() -> None:
    draws = Draws.for_range(0, 0, 0, 200)
    columns = torch.stack(
        [
            draws.uniform("x", (1000,)).flatten(),
            draws.at_step(1).uniform("x", (1000,)).flatten(),
            draws.uniform("y", (1000,)).flatten(),
            Draws.for_range(0, 0, 1, 200).within("a").uniform("x", (1000,)).flatten(),
            draws.uniform("x", (1000,)).roll(1, 0).flatten(),
            draws.uniform("x", (1000,)).roll(1, 1).flatten(),
        ]
    )
    correlations = columns.corrcoef() - torch.eye(6, dtype=torch.float64)
    # 200,000 independent pairs: standard error 1 / sqrt(200000); six of them.
    assert float(correlations.abs().max()) < 6 / math.sqrt(200_000)


def test_uniforms_are_uniform_and_never_touch_the_ends() -> None:
    values = Draws.for_range(0, 0, 0, 1000).uniform("x", (1000,)).flatten()
    assert 0 < float(values.min()) < float(values.max()) < 1
    counts = torch.histc(values, 100, 0, 1)
    chi_square = float(((counts - 1e4) ** 2 / 1e4).sum())
    # 99 degrees of freedom: mean 99, standard deviation sqrt(198); six of them.
    assert abs(chi_square - 99) < 6 * math.sqrt(198)
    low_bits = (values * 2**52).long() % 2**20
    low_counts = (low_bits % 128).bincount(minlength=128)
    # 127 degrees of freedom: mean 127, standard deviation sqrt(254); six of them.
    assert abs(float(((low_counts - 1e6 / 128) ** 2 / (1e6 / 128)).sum()) - 127) < 6 * math.sqrt(254)
    assert abs(float(torch.stack((values, low_bits.double())).corrcoef()[0, 1])) < 6 / 1000
    serial = torch.stack((values[:-1], values[1:])).corrcoef()[0, 1]
    assert abs(float(serial)) < 6 / 1000


def test_normals_have_the_moments_and_tails_of_a_gaussian() -> None:
    values = Draws.for_range(0, 0, 0, 1000).normal("x", (1000,)).double().flatten()
    assert abs(float(values.mean())) < 6 / 1000
    assert abs(float(values.var()) - 1) < 6 * math.sqrt(2) / 1000
    expected = 1e6 * math.erfc(4 / math.sqrt(2))  # about 63 beyond four standard deviations
    assert abs(float((values.abs() > 4).sum()) - expected) < 6 * math.sqrt(expected)


def test_integers_cover_their_range_evenly() -> None:
    counts = Draws.for_range(0, 0, 0, 10_000).integers("x", 7, (10,)).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert float(((counts - 1e5 / 7) ** 2 / (1e5 / 7)).sum()) < 6 + 6 * math.sqrt(12)


def test_categorical_follows_probabilities_down_to_a_billionth() -> None:
    probs = torch.tensor([1e-9, 1e-6, 0.25, 1e-9, 0.75 - 1e-6 - 2e-9, 0.0], dtype=torch.float64)
    # Stratified uniforms: a category of probability p is hit by p n of them, give or take one.
    n = 2_000_000_000
    for low, high, category in ((0.0, 1e-9, 0), (1e-9, 1e-9 + 1e-6, 1), (0.25 + 1.001e-6, 0.25 + 1.002e-6, 3)):
        start, stop = math.floor(low * n) - 3, math.ceil(high * n) + 3
        grid = (torch.arange(max(start, 0), stop, dtype=torch.float64) + 0.5) / n
        hits = int((categorical_from_uniform(probs.expand(len(grid), -1), grid) == category).sum())
        assert abs(hits - float(probs[category]) * n) <= 1


def test_categories_of_a_millionth_are_drawn_as_often_as_they_should() -> None:
    """The project's own noise: each of sixteen counts is Poisson of mean 10, in 10 million draws."""
    rare, chunks = 16, 20
    probs = torch.full((rare + 1,), 1e-6, dtype=torch.float64)
    probs[-1] = 1 - rare * 1e-6
    counts = torch.zeros(rare + 1, dtype=torch.int64)
    for chunk in range(chunks):
        drawn = Draws.for_range(0, 0, 500 * chunk, 500).categorical("c", probs.expand(500, 1000, -1))
        counts += drawn.flatten().bincount(minlength=rare + 1)
    assert int(counts.sum()) == 10_000_000
    tail = counts[:-1].double()
    assert abs(float(tail.sum()) - 160) < 6 * math.sqrt(160)  # six standard deviations of a Poisson count
    # Sum of squared Poisson residuals: per term mean 1 and variance 2 + 1 / 10; six standard deviations of the sum.
    assert abs(float(((tail - 10) ** 2 / 10).sum()) - rare) < 6 * math.sqrt(2.1 * rare)


def test_float32_gumbel_noise_could_not_draw_the_tail() -> None:
    """The trap that the inverse distribution function avoids: float32 uniforms cap Gumbel noise near 16.6."""
    probs = torch.tensor([1 - 1e-9, 1e-9], dtype=torch.float64)

    def gumbel(uniform: torch.Tensor) -> torch.Tensor:
        return -torch.log(-torch.log(uniform))

    # The best case for the tail: its own noise the largest that float32 can give, the favourite's the lowest of 2^24.
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    assert float(gumbel(largest)) == pytest.approx(16.635, abs=1e-3)
    noise = torch.stack((gumbel(torch.tensor(2.0**-24)), gumbel(largest)))
    assert int((probs.float().log() + noise).argmax()) == 0, "float32 Gumbel-max never draws the tail"
    # The inverse distribution function draws it at every uniform in an interval of the right length.
    edge = torch.tensor([1 - 1.001e-9, 1 - 0.999e-9, 1 - 2.0**-53], dtype=torch.float64)
    assert categorical_from_uniform(probs.expand(3, -1), edge).tolist() == [0, 1, 1]


def test_weights_need_no_normalisation_and_keep_float64_precision() -> None:
    uniform = Draws.for_range(0, 0, 0, 5000).uniform("u")
    probs = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    plain = categorical_from_uniform(probs.expand(5000, -1), uniform)
    assert torch.equal(plain, (uniform >= 0.2).long() + (uniform >= 0.7).long())
    assert torch.equal(plain, categorical_from_uniform(1024 * probs.expand(5000, -1), uniform))


def test_a_category_of_weight_zero_is_never_drawn_at_the_ends() -> None:
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    ends = torch.tensor([2.0**-53, 0.5 * 2.0**-1022, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert categorical_from_uniform(probs.expand(4, -1), ends).tolist() == [1, 1, 3, 3]
    # A product that underflows to zero must not reach a category of weight zero either.
    faint = torch.tensor([0.0, 1e-310], dtype=torch.float64)
    assert int(categorical_from_uniform(faint, ends[0])) == 1
    tiny = torch.full((50_000,), 1e-5, dtype=torch.float32)
    tiny[40_000:] = 0
    assert int(categorical_from_uniform(tiny, torch.tensor(1 - 2.0**-53, dtype=torch.float64))) == 39_999
