"""Randomness: known answers, independence of the batch, exact tails."""

from __future__ import annotations

import math

import pytest
import torch

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


def test_uniforms_are_uniform_and_never_touch_the_ends() -> None:
    values = Draws.for_range(0, 0, 0, 1000).uniform("x", (1000,)).flatten()
    assert 0 < float(values.min()) < float(values.max()) < 1
    counts = torch.histc(values, 100, 0, 1)
    chi_square = float(((counts - 1e4) ** 2 / 1e4).sum())
    # 99 degrees of freedom: mean 99, standard deviation sqrt(198); six of them.
    assert abs(chi_square - 99) < 6 * math.sqrt(198)
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
    # And with the project's own noise: the count of the rare ones is Poisson.
    total = 4_000_000
    drawn = Draws.for_range(0, 0, 0, 4000).categorical("c", probs.expand(4000, 1000, -1)).flatten()
    counts = drawn.bincount(minlength=6)
    assert counts[5] == 0
    assert int(counts[0] + counts[3]) <= 2  # expectation 0.008
    assert int(counts[1]) <= 4 + 6 * 2  # expectation 4, standard deviation 2
    assert abs(int(counts[2]) - total / 4) < 6 * math.sqrt(total * 3 / 16)


def test_float32_gumbel_noise_could_not_draw_the_tail() -> None:
    """The trap that the inverse distribution function avoids: float32 uniforms cap Gumbel noise near 16.6."""
    largest = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))
    cap = float(-torch.log(-torch.log(largest)))
    assert cap == pytest.approx(16.635, abs=1e-3)
    # A token of probability 1e-9 against one of nearly 1 needs a lead of 20.7 nats: beyond what the cap can give
    # unless the favourite draws a very low value as well.
    assert math.log(1e9) > cap


def test_a_category_of_weight_zero_is_never_drawn_at_the_ends() -> None:
    probs = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    ends = torch.tensor([2.0**-53, 0.5 * 2.0**-1022, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    assert categorical_from_uniform(probs.expand(4, -1), ends).tolist() == [1, 1, 3, 3]
    tiny = torch.full((50_000,), 1e-5, dtype=torch.float32)
    tiny[40_000:] = 0
    assert int(categorical_from_uniform(tiny, torch.tensor(1 - 2.0**-53, dtype=torch.float64))) == 39_999
