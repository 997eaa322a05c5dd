"""Both processes against Bayes' rule by enumeration, in float64."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from worlds import SCHEDULES, bayes_posterior, forward_matrix, make_process

from dmmd_core import Backbone, Draws, NetworkPrediction, Process
from dmmd_core import draws as draws_module

PROCESSES = [(name, schedule) for name in ("masked", "uniform", "skewed") for schedule in SCHEDULES]
TIMES = [0.0, 0.13, 0.5, 0.77, 1.0]


@pytest.fixture(params=PROCESSES, ids="-".join)
def process(request: pytest.FixtureRequest) -> Process:
    return make_process(request.param[0], 3, request.param[1])


@pytest.mark.parametrize("name", SCHEDULES)
def test_signal_level_ends_exactly_and_its_derivative_is_right(name: str) -> None:
    schedule = SCHEDULES[name]
    for dtype in (torch.float32, torch.float64):
        assert schedule.alpha(torch.tensor([0.0, 1.0], dtype=dtype)).tolist() == [1.0, 0.0]
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    assert torch.allclose(schedule.alpha_prime(t.detach()), slope, rtol=0, atol=1e-12)
    assert bool((alpha[1:] < alpha[:-1]).all())


def test_posterior_is_bayes_rule(process: Process) -> None:
    for s, t in itertools.combinations(TIMES, 2):
        for x, z_t in itertools.product(range(3), range(process.num_inputs)):
            if forward_matrix(process, 0.0, t)[x, z_t] == 0 or process.alpha(torch.tensor(s)) == 0:
                continue
            one_hot = torch.nn.functional.one_hot(torch.tensor([[x]]), 3).double()
            times = torch.tensor([s, t], dtype=torch.float64)
            given = process.posterior_probs(one_hot, torch.tensor([[z_t]]), times[:1], times[1:])[0, 0]
            assert torch.allclose(given, bayes_posterior(process, x, z_t, s, t), rtol=0, atol=1e-12)


def test_posterior_of_equal_times_is_the_identity(process: Process) -> None:
    states = torch.arange(process.num_inputs).unsqueeze(1)
    x_probs = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).expand(len(states), 1, 3)
    one_hot = torch.eye(process.num_inputs, dtype=torch.float64).unsqueeze(1)
    for time in (*TIMES[1:], 1e-9, 1 - 1e-12):
        t = torch.full((len(states),), time, dtype=torch.float64)
        assert torch.allclose(process.posterior_probs(x_probs, states, t, t), one_hot, rtol=0, atol=1e-15)
    clean = states[:3]
    t = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(process.posterior_probs(x_probs[:3], clean, t, t)[..., :3], one_hot[:3, :, :3])


def test_posterior_of_a_distribution_is_the_average_of_its_tokens_posteriors(process: Process) -> None:
    p = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    s, t = torch.tensor([0.3], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)
    for z_t in range(process.num_inputs):
        if process.prior()[z_t] == 0:
            continue
        given = process.posterior_probs(p.reshape(1, 1, 3), torch.tensor([[z_t]]), s, t)[0, 0]
        expected = sum(p[x] * bayes_posterior(process, x, z_t, 0.3, 0.8) for x in range(3))
        assert torch.allclose(given, expected, rtol=0, atol=1e-14)  # type: ignore[arg-type]


def test_posteriors_composed_over_any_partition_give_the_forward_marginals(process: Process) -> None:
    source = torch.Generator().manual_seed(0)
    for _ in range(5):
        cuts = torch.rand(6, generator=source, dtype=torch.float64).sort(descending=True).values.tolist()
        grid = [1.0, *cuts, 0.0]
        for x in range(3):
            one_hot = torch.nn.functional.one_hot(torch.tensor(x), 3).double()
            states = torch.arange(process.num_inputs).unsqueeze(1)
            weights = process.prior()
            for t, s in itertools.pairwise(grid):
                alpha = process.alpha(torch.tensor([s, t], dtype=torch.float64))
                times = torch.tensor([s, t], dtype=torch.float64)
                s_all, t_all = (time.expand(len(states)) for time in times)
                table = process.posterior_probs(one_hot.expand(len(states), 1, -1), states, s_all, t_all)
                weights = weights @ table[:, 0]
                marginal = (1 - alpha[0]) * process.prior()
                marginal[x] += alpha[0]
                assert torch.allclose(weights, marginal, rtol=0, atol=1e-10)


def test_equal_times_are_the_identity_and_time_zero_gives_the_clean_token(process: Process) -> None:
    draws = Draws.for_range(0, 0, 0, 500)
    x = draws.integers("tokens", 3, (4,))
    for time in (0.0, 0.4, 1 - 1e-12, 1.0):
        t = torch.full((500,), time, dtype=torch.float64)
        z_t = process.corrupt(x, t, draws)
        assert torch.equal(process.posterior_sample(x, z_t, t, t, draws), z_t)
        assert torch.equal(process.posterior_sample(x, z_t, torch.zeros_like(t), t, draws), x)


def test_ends_of_the_time_axis(process: Process) -> None:
    draws = Draws.for_range(0, 0, 0, 3000)
    x = torch.zeros(3000, 4, dtype=torch.int64)
    assert torch.equal(process.corrupt(x, torch.zeros(3000), draws), x)
    counts = process.corrupt(x, torch.ones(3000), draws).flatten().bincount(minlength=process.num_inputs)
    prior = process.prior()
    bound = 6 * (12_000 * prior * (1 - prior)).sqrt()  # six standard deviations of a binomial count
    assert bool(((counts - 12_000 * prior).abs() <= bound).all())


@pytest.mark.parametrize(("s", "t"), [(0.2, 0.7), (0.0, 0.5), (0.6, 1.0)])
def test_sampled_frequencies_follow_the_posterior(process: Process, s: float, t: float) -> None:
    count = 40_000
    draws = Draws.for_range(1, 0, 0, count)
    times = torch.full((count,), s, dtype=torch.float64), torch.full((count,), t, dtype=torch.float64)
    for x, z_t in itertools.product(range(2), range(process.num_inputs)):
        if forward_matrix(process, 0.0, t)[x, z_t] == 0:
            continue
        clean, noisy = torch.full((count, 1), x), torch.full((count, 1), z_t)
        counts = process.posterior_sample(clean, noisy, *times, draws).flatten().bincount(minlength=process.num_inputs)
        probs = bayes_posterior(process, x, z_t, s, t)
        bound = 6 * (count * probs * (1 - probs)).sqrt() + 1e-6
        assert bool(((counts - count * probs).abs() <= bound).all()), (x, z_t)


def test_corrupt_frequencies(process: Process) -> None:
    count = 40_000
    draws = Draws.for_range(1, 0, 0, count)
    x = torch.full((count, 1), 1)
    counts = process.corrupt(x, torch.full((count,), 0.35), draws).flatten().bincount(minlength=process.num_inputs)
    probs = forward_matrix(process, 0.0, 0.35)[1]
    assert bool(((counts - count * probs).abs() <= 6 * (count * probs * (1 - probs)).sqrt() + 1e-6).all())


def test_evidence_is_the_log_ratio_of_likelihoods(process: Process) -> None:
    for time, z in itertools.product((0.01, 0.5, 0.99), range(3)):
        if process.prior()[z] == 0:
            continue
        likelihood = forward_matrix(process, 0.0, time)[:3, z]
        given = process.evidence(torch.tensor([z]), torch.tensor([time], dtype=torch.float64))
        expected = math.log(float(likelihood[z]) / float(likelihood[(z + 1) % 3]))
        assert float(given) == pytest.approx(expected, rel=1e-12)
    if process.num_inputs > 3:
        assert process.evidence(torch.tensor([3]), torch.tensor([0.5])).tolist() == [0.0]


def test_prior_samples_follow_the_prior(process: Process) -> None:
    counts = process.prior_sample(4, Draws.for_range(0, 0, 0, 10_000)).flatten().bincount(minlength=process.num_inputs)
    prior = process.prior()
    # Six standard deviations of a binomial count.
    assert bool(((counts - 40_000 * prior).abs() <= 6 * (40_000 * prior * (1 - prior)).sqrt()).all())


@pytest.mark.parametrize("word", [0, 0xFFFFFFFF])
def test_the_most_extreme_noise_is_still_an_input_id_that_the_prior_allows(
    monkeypatch: pytest.MonkeyPatch, word: int
) -> None:
    """The prior's distribution function may end below one by rounding, and the largest uniform beyond it."""
    monkeypatch.setattr(draws_module, "philox_4x32", lambda counter, key: (counter[0] * 0 + counter[1] * 0 + word,) * 4)
    ends_below_one = 0
    for name, size in itertools.product(("masked", "uniform", "skewed"), range(2, 50)):
        process = make_process(name, size)
        ends_below_one += float(process.prior().cumsum(0)[-1]) <= 1 - 2.0**-53
        (token,) = process.prior_sample(1, Draws.for_range(0, 0, 0, 1)).flatten().tolist()
        assert token < process.num_inputs
        assert process.prior()[token] > 0
    assert ends_below_one > 0


def test_posterior_looks_at_x_only_where_it_said(process: Process) -> None:
    draws = Draws.for_range(2, 0, 0, 2000)
    x = draws.integers("tokens", 3, (5,))
    t, s = torch.full((2000,), 0.8, dtype=torch.float64), torch.full((2000,), 0.45, dtype=torch.float64)
    z_t = process.corrupt(x, t, draws)
    rows = process.rows_to_draw(z_t, s, t, draws)
    first = process.posterior_sample(x, z_t, s, t, draws)
    for shift in (1, 2):
        garbled = torch.where(rows, x, (x + shift) % 3)
        assert torch.equal(first, process.posterior_sample(garbled, z_t, s, t, draws))
    assert bool(rows.any())
    masked = z_t == 3
    moves = process.posterior_sample((x + 1) % 3, z_t, s, t, draws) != first
    assert torch.equal(rows & masked, moves & masked), "no masked position is drawn in vain"
    if process.prior()[0] == 0:
        assert torch.equal(rows, masked & (first != 3)), "masked: exactly the positions that are revealed"
    assert not bool(process.rows_to_draw(x, s * 0, t * 0, draws).any()), "nothing is left to draw at time 0"


def test_a_time_per_position_acts_on_that_position_alone(process: Process) -> None:
    draws = Draws.for_range(3, 0, 0, 300)
    x = draws.integers("tokens", 3, (4,))
    t = torch.tensor([0.9, 0.0, 0.5, 1.0], dtype=torch.float64).expand(300, -1)
    s = torch.tensor([0.4, 0.0, 0.5, 0.2], dtype=torch.float64).expand(300, -1)
    z_t = process.corrupt(x, t, draws)
    probs = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).expand(300, 4, -1)
    wide = (
        z_t,
        process.posterior_sample(x, z_t, s, t, draws),
        process.rows_to_draw(z_t, s, t, draws),
        process.posterior_probs(probs, z_t, s, t),
        process.known(z_t, t),
    )
    for position in range(4):
        now, then = t[:, position], s[:, position]
        if position != 1:  # the other tokens of a column at time 0 could not be noisy
            assert torch.equal(process.corrupt(x, now, draws)[:, position], z_t[:, position])
        flat = (
            process.corrupt(x, now, draws),
            process.posterior_sample(x, z_t, then, now, draws),
            process.rows_to_draw(z_t, then, now, draws),
            process.posterior_probs(probs, z_t, then, now),
            process.known(z_t, now),
        )
        for given, expected in zip(wide, flat, strict=True):
            assert torch.equal(given[:, position], expected[:, position])


def test_fixed_positions_stay_while_others_move(process: Process) -> None:
    draws = Draws.for_range(3, 0, 0, 300)
    x = draws.integers("tokens", 3, (4,))
    flat = torch.full((300,), 0.6, dtype=torch.float64)
    wide = flat.unsqueeze(1).repeat(1, 4)
    z_t = process.corrupt(x, flat, draws)
    assert torch.equal(z_t, process.corrupt(x, wide, draws))
    wide[:, 1] = 0.0
    fixed = process.corrupt(x, wide, draws)
    assert torch.equal(fixed[:, 1], x[:, 1])
    assert torch.equal(fixed[:, 2], z_t[:, 2])
    moved = process.posterior_sample(torch.zeros_like(x), fixed, wide / 2, wide, draws)
    assert torch.equal(moved[:, 1], x[:, 1])


@pytest.mark.parametrize("parametrization", ["mean", "leave_one_out"])
def test_logits_become_the_mean_by_the_evidence_of_their_own_token(parametrization: str) -> None:
    process = make_process("uniform", 4, "linear", parametrization=parametrization)
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z, t = torch.arange(4), torch.tensor([0.1, 0.4, 0.9, 1.0], dtype=torch.float64)
    given = process.clean_log_probs(logits, z, t)
    for row in range(4):
        likelihood = forward_matrix(process, 0.0, float(t[row]))[:, z[row]]
        expected = logits[row].exp() * (likelihood if parametrization == "leave_one_out" else 1)
        assert torch.allclose(given[row].exp(), expected / expected.sum(), rtol=0, atol=1e-12)


def test_known_positions_carry_their_token_over_without_leaks() -> None:
    process = make_process("masked", 4)
    source = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, dtype=torch.float64, generator=source).requires_grad_()
    given = process.clean_log_probs(logits, torch.tensor([2, 4, 0]), torch.tensor([0.5, 0.5, 0.5]))
    assert given[0].exp().tolist() == [0, 0, 1, 0]
    assert given[2].exp().tolist() == [1, 0, 0, 0]
    assert given[0, 0].item() == -math.inf, "a finite stand-in would leak into soft cross-entropies"
    given[1].sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[0].abs().sum() + logits.grad[2].abs().sum()) == 0


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_conversion_has_finite_gradients_at_both_ends_of_time(name: str) -> None:
    params = {"parametrization": "leave_one_out"} if name == "uniform" else {}
    process = make_process(name, 3, "cosine", **params)
    logits = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor([0.0, 1e-12, 1.0, 1.0], dtype=torch.float64)
    z = torch.tensor([1, 2, process.num_inputs - 1, process.num_inputs - 1])
    given = process.clean_log_probs(logits, z, t)
    assert given[0].exp().tolist() == [0, 1, 0]
    assert torch.equal(given[2], logits[2].log_softmax(-1)), "pure noise is no evidence"
    process.row_losses(torch.tensor([1, 2, 0, 1]), given, z, t).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    assert float(logits.grad[0].abs().sum()) == 0


@pytest.mark.parametrize(("narrow", "wide"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_a_networks_logits_are_normalised_in_float32_or_wider(narrow: torch.dtype, wide: torch.dtype) -> None:
    process = make_process("masked", 40)
    logits = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).to(narrow)
    backbone = cast(Backbone, SimpleNamespace(head=lambda features: features))
    z, t = torch.full((2, 3), 40), torch.tensor([0.3, 0.9])
    given = NetworkPrediction(backbone, process, logits, z, t).log_probs(torch.tensor([4, 0]))
    assert given.dtype == wide
    expected = logits.to(wide).flatten(0, 1)[[4, 0]].log_softmax(-1)
    assert torch.equal(given, expected)


def test_soft_targets_ask_nothing_where_they_are_zero() -> None:
    """Carry-over as minus infinity must neither leak into soft cross-entropies nor turn them into NaN."""
    process = make_process("masked", 3)
    log_probs = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log().requires_grad_()
    target = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    loss = process.row_losses(target, log_probs, torch.tensor([3]), torch.tensor([0.5]))
    assert float(loss.detach()) == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(loss.sum(), log_probs)
    assert gradient.tolist() == [[-0.5, -0.5, 0.0]]


def test_elbo_weight_of_the_masked_process() -> None:
    process = make_process("masked", 4, "cosine", weight="elbo", min_time=0.01)
    s = torch.tensor([0.0, 0.005, 0.3, 1.0], dtype=torch.float64)
    bounded = s.clamp_min(0.01)
    expected = 0.5 * math.pi * torch.sin(0.5 * math.pi * bounded) / (1 - torch.cos(0.5 * math.pi * bounded))
    assert torch.allclose(process.loss_weight(s), expected, rtol=1e-10)
    assert torch.equal(make_process("masked").loss_weight(s), torch.ones_like(s))


def test_elbo_weight_of_the_uniform_process() -> None:
    params = {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out", "min_time": 0.01}
    process = make_process("uniform", 4, "cosine", **params)
    s = torch.tensor([0.0, 0.005, 0.3, 0.995, 1.0], dtype=torch.float64)
    angle = 0.5 * math.pi * s.clamp(0.01, 0.99)
    expected = 0.5 * math.pi * torch.sin(angle) / (4 * torch.cos(angle))
    assert torch.allclose(process.loss_weight(s), expected, rtol=1e-12)
    assert torch.equal(make_process("uniform").loss_weight(s), torch.ones_like(s))


def test_clean_posterior_is_bayes_rule(process: Process) -> None:
    p = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    for s, t in [(0.13, 0.5), (0.5, 0.77), (0.77, 1.0), (0.3, 0.3)]:
        for z_t, z_s in itertools.product(range(process.num_inputs), repeat=2):
            if z_t < 3 and process.prior()[z_t] == 0:
                continue  # known at t already: nothing is left to learn
            joint = torch.stack([p[x] * forward_matrix(process, 0.0, s)[x, z_s] for x in range(3)])
            joint = joint * forward_matrix(process, s, t)[z_s, z_t]
            # Given z_t, p(x) is the distribution of x; so divide by what z_t had told: q(z_t | x).
            joint = joint / torch.stack([forward_matrix(process, 0.0, t)[x, z_t] for x in range(3)])
            if joint.sum() == 0:  # z_s and z_t contradict each other
                continue
            given = process.clean_posterior(
                p.log().unsqueeze(0),
                torch.tensor([z_t]),
                torch.tensor([z_s]),
                torch.tensor([s], dtype=torch.float64),
                torch.tensor([t], dtype=torch.float64),
            )
            assert torch.allclose(given.exp()[0], joint / joint.sum(), rtol=0, atol=1e-12), (s, t, z_t, z_s)
