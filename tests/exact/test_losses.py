"""The process losses against a naive transcription, and their optima on enumerated worlds."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor
from worlds import forward_matrix, make_process, naive_leave_one_out, naive_mean

from dmmd_core import Codec, FieldError, Process, rows_with_loss, sum_over_rows
from dmmd_core.loss import Rows
from dmmd_data.enumerable import Mixture
from dmmd_processes.uniform import Uniform

ELBO = {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out"}


def _world() -> tuple[Tensor, int]:
    data = Mixture(Mixture.Config(components=3, letters=3, length=3, seed=1), codec=_NoCodec())
    return data.probabilities(), 3


class _NoCodec(Codec):
    def decode(self, tokens: Tensor) -> Tensor:
        return tokens

    def encode(self, media: Tensor) -> Tensor:
        return media

    def fingerprint(self) -> str:
        return "none"


def _naive_posterior_kl(y: Tensor, c: int, i: int, alpha: float) -> float:
    size = len(y)
    x_bar = [size * alpha * (j == c) + 1 - alpha for j in range(size)]
    y_bar = [size * alpha * float(y[j]) + 1 - alpha for j in range(size)]
    total = size / y_bar[i] - size / x_bar[i]
    for j in range(size):
        total += x_bar[j] / x_bar[i] * math.log(y_bar[i] * x_bar[j] / (y_bar[j] * x_bar[i]))
    return total


@pytest.mark.parametrize("time", [0.1, 0.5, 0.95])
def test_posterior_kl_is_the_written_formula(time: float) -> None:
    process = make_process("uniform", 4, "cosine", **ELBO)
    y = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(-1)
    s = torch.tensor([time], dtype=torch.float64)
    alpha = float(process.alpha(s))
    for i in range(4):
        likelihood = forward_matrix(process, 0.0, time)[:, i]
        mean = y * likelihood / (y * likelihood).sum()
        given = process.candidate_losses(mean.log().unsqueeze(0), torch.tensor([i]), s)[0]
        expected = [_naive_posterior_kl(y, c, i, alpha) for c in range(4)]
        assert torch.allclose(given, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    slope = float(process.schedule.alpha_prime(s))
    assert float(process.loss_weight(s)) == pytest.approx(-slope / (4 * alpha), rel=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "maskgit_cosine", "polynomial"])
def test_posterior_kl_keeps_its_digits_in_float32(schedule: str) -> None:
    """Near s = 0 float32 has few digits of 1 - alpha, by which the loss of every other token is divided."""
    s = torch.full((4,), 1e-4, dtype=torch.float64)
    process = make_process("uniform", 4, schedule, **ELBO, min_time=1e-4)
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    z = torch.arange(4)
    wide, narrow = (
        process.candidate_losses(process.clean_log_probs(one, z, s), z, s) for one in (logits, logits.float())
    )
    # Some ten roundings of 2^-24, on logarithms up to 20.
    assert torch.allclose(narrow.double(), wide, rtol=3e-6, atol=0)


def test_posterior_kl_is_finite_at_both_ends_of_time() -> None:
    process = make_process("uniform", 3, "cosine", **ELBO)
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    logits = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z = torch.tensor([0, 2])
    losses = process.candidate_losses(process.clean_log_probs(logits, z, s), z, s)
    assert bool((losses.isfinite() & (losses > -1e-9)).all())
    assert bool(process.loss_weight(s).isfinite().all())
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    assert bool(gradient.isfinite().all())


def test_rows_that_carry_a_loss_are_those_still_masked_or_all() -> None:
    s = torch.tensor([0.5, 0.0], dtype=torch.float64)
    z = torch.tensor([[0, 3, 2], [1, 0, 2]])
    assert make_process("masked", 3).rows_with_loss(z, s).tolist() == [[False, True, False], [False] * 3]
    assert make_process("uniform", 4).rows_with_loss(z, s).tolist() == [[True] * 3] * 2


def _optimum(process: Process, probabilities: Tensor, length: int, z: Tensor, time: float) -> Tensor:
    """Best logits for one noisy sequence when x is drawn from its exact posterior given that sequence."""
    target = naive_mean(process, probabilities, length, z, time)
    logits = torch.zeros(length, process.vocab_size, dtype=torch.float64, requires_grad=True)
    t = torch.full((length,), time, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_probs = process.clean_log_probs(logits, z, t)
        loss = process.row_losses(target, log_probs, z, t).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach()


@pytest.mark.parametrize("z", [[0, 1, 2], [2, 2, 0]])
def test_posterior_kl_has_its_optimum_at_leave_one_out_which_converts_to_the_mean(z: list[int]) -> None:
    probabilities, length = _world()
    process = make_process("uniform", 3, "linear", **ELBO)
    tokens = torch.tensor(z)
    logits = _optimum(process, probabilities, length, tokens, 0.6)
    leave_one_out = naive_leave_one_out(process, probabilities, length, tokens, 0.6)
    mean = naive_mean(process, probabilities, length, tokens, 0.6)
    assert torch.allclose(logits.softmax(-1), leave_one_out, rtol=0, atol=1e-5)
    assert float((leave_one_out - mean).abs().max()) > 0.05, "the two must differ for the test to mean anything"
    t = torch.full((length,), 0.6, dtype=torch.float64)
    assert torch.allclose(process.clean_log_probs(logits, tokens, t).exp(), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("params", [{}, {"parametrization": "leave_one_out"}])
def test_cross_entropy_has_its_optimum_at_the_mean(params: dict[str, str]) -> None:
    probabilities, length = _world()
    process = make_process("uniform", 3, "linear", **params)
    tokens = torch.tensor([0, 1, 2])
    logits = _optimum(process, probabilities, length, tokens, 0.6)
    t = torch.full((length,), 0.6, dtype=torch.float64)
    mean = naive_mean(process, probabilities, length, tokens, 0.6)
    assert torch.allclose(process.clean_log_probs(logits, tokens, t).exp(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"loss": "posterior_kl", "weight": "elbo"}, "parametrization"),
        ({"loss": "posterior_kl", "parametrization": "leave_one_out"}, "weight"),
        ({"weight": "elbo"}, "weight"),
    ],
)
def test_mismatched_pairs_are_refused(params: dict[str, str], field: str) -> None:
    with pytest.raises(FieldError) as caught:
        Uniform.Config(**params)  # type: ignore[arg-type]
    assert caught.value.field == field


def _negative_elbo(process: Process, probabilities: Tensor, length: int, nodes: int, power: int) -> float:
    """Integral over s of E[w(s) sum_l loss_l] for the exact denoiser: Gauss-Legendre in s ** (1 / power)."""
    places, weights = (torch.from_numpy(part) for part in numpy.polynomial.legendre.leggauss(nodes))
    states = torch.cartesian_prod(*[torch.arange(process.num_inputs)] * length)
    sequences = torch.cartesian_prod(*[torch.arange(process.vocab_size)] * length)
    total = 0.0
    for place, weight in zip((places + 1) / 2, weights / 2, strict=True):
        time = place**power
        s = time.expand(len(states))
        forward = forward_matrix(process, 0.0, float(time))
        marginal = probabilities @ forward[sequences.unsqueeze(1), states.unsqueeze(0)].prod(-1)
        mean = torch.stack([naive_mean(process, probabilities, length, z, float(time)) for z in states])
        for position in range(length):
            carries = process.rows_with_loss(states, s)[:, position] & (marginal > 0)
            z, target = states[carries, position], mean[carries, position]
            losses = process.row_losses(target, target.log(), z, s[carries])
            inner = (marginal[carries] * process.loss_weight(s[carries]) * losses).sum()
            total += float(weight * power * place ** (power - 1) * inner)
    return total


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
    ("name", "params", "nodes", "power", "tolerance"),
    [
        ("masked", {"weight": "elbo", "min_time": 1e-9}, 12, 1, 1e-12),
        ("uniform", {**ELBO, "min_time": 1e-9}, 24, 3, 3e-8),
    ],
    ids=["masked", "uniform"],
)
def test_elbo_of_the_exact_denoiser_is_the_entropy_of_the_data(
    name: str, params: dict[str, object], nodes: int, power: int, tolerance: float, schedule: str
) -> None:
    """In continuous time the bound is tight; so loss and weight are right together, whatever the schedule.

    The tolerance is that of the quadrature.
    """
    data = Mixture(Mixture.Config(components=2, letters=2, length=2, seed=1, sharpness=1.0), codec=_NoCodec())
    probabilities = data.probabilities()
    entropy = -float(torch.special.xlogy(probabilities, probabilities).sum())
    process = make_process(name, 2, schedule, **params)
    assert _negative_elbo(process, probabilities, 2, nodes, power) == pytest.approx(entropy, abs=tolerance)


def _loss(process: Process, z: Tensor, s: Tensor, row_loss: Callable[[Rows], Tensor], chunk: int = 0) -> Tensor:
    return sum_over_rows(rows_with_loss(process, z, s), row_loss, chunk)


def test_loss_is_divided_by_batch_and_length_and_never_by_the_number_of_masked_positions() -> None:
    process = make_process("masked", 3, weight="elbo")
    z = torch.tensor([[3, 0, 1, 2], [3, 3, 3, 0]])
    s = torch.tensor([0.5, 0.25], dtype=torch.float64)
    given = _loss(process, z, s, lambda rows: torch.ones(len(rows.index)))
    assert float(given) == pytest.approx((1 / 0.5 * 1 + 1 / 0.25 * 3) / 8)
    # As many visible positions again: the masked ones count half, and not the same.
    wider = torch.cat((z, torch.zeros_like(z)), dim=1)
    assert float(_loss(process, wider, s, lambda rows: torch.ones(len(rows.index)))) == pytest.approx(float(given) / 2)


def test_rows_without_loss_are_selected_away_and_not_multiplied_by_zero() -> None:
    process = make_process("masked", 3)
    z, s = torch.tensor([[3, 0]]), torch.tensor([0.5])
    logits = torch.tensor([[0.1, 0.2, 0.3], [torch.nan, torch.inf, 0.0]], requires_grad=True)
    loss = _loss(process, z, s, lambda rows: -logits[rows.index].log_softmax(-1)[:, 0])
    loss.backward()
    assert bool(loss.isfinite())
    assert logits.grad is not None
    assert bool(logits.grad[0].isfinite().all())
    assert float(logits.grad[0].abs().sum()) > 0
    assert logits.grad[1].tolist() == [0, 0, 0]


def test_a_batch_without_any_loss_is_zero() -> None:
    process = make_process("masked", 3)
    weight = torch.ones(3, requires_grad=True)
    loss = _loss(process, torch.tensor([[0, 1]]), torch.tensor([0.5]), lambda rows: weight[rows.index % 3])
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_change_neither_value_nor_gradient(chunk: int) -> None:
    process = make_process("uniform", 5)
    z = torch.randint(0, 5, (4, 6), generator=torch.Generator().manual_seed(0))
    s = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    source = torch.Generator().manual_seed(1)
    head = torch.randn(7, 5, dtype=torch.float64, generator=source).requires_grad_()
    features = torch.randn(24, 7, dtype=torch.float64, generator=source).requires_grad_()

    def row_loss(rows: Rows) -> Tensor:
        log_probs = (features[rows.index] @ head).log_softmax(-1)
        return torch.stack((process.row_losses(rows.z, log_probs, rows.z, rows.s), log_probs.square().sum(-1)))

    values, gradients = [], []
    for size in (0, chunk):
        total = _loss(process, z, s, row_loss, size)
        values.append(total.detach())
        gradients.append(torch.autograd.grad(total.sum(), (head, features)))
    # The rows' weights are float32 numbers, the same in both; all else is float64.
    assert torch.allclose(values[0], values[1], rtol=1e-12, atol=0)
    for plain, chunked in zip(*gradients, strict=True):
        assert torch.allclose(plain, chunked, rtol=0, atol=1e-12)
