"""Discrete consistency distillation: its trajectory against the Gaussian one, its loss against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worlds import Free, make_process

from dmmd_core import Batch, Draws
from dmmd_objectives.dcd import ConsistencyDistillation

VOCAB, LENGTH, BATCH = 4, 3, 64


def _game(process_name: str = "uniform", **params: object) -> tuple[ConsistencyDistillation, Free, Free]:
    process = make_process(process_name, VOCAB)
    student, teacher = Free(process, LENGTH, 0), Free(process, LENGTH, 1)
    config = ConsistencyDistillation.Config(**{"rounds": 1, **params})  # type: ignore[arg-type]
    game = ConsistencyDistillation(
        config, process=process, network=student, teacher=teacher, num_steps=2, training_steps=9
    )
    return game, student, teacher


def _inputs(step: int = 0) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, step, 0, BATCH)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


def _shown(ratio: float) -> float:
    """Probability that ``argmax(ratio * one_hot(x) + noise)`` is x, by quadrature."""
    z = torch.linspace(-12, 12 + ratio, 20_001, dtype=torch.float64)
    density = torch.exp(-((z - ratio) ** 2) / 2) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * torch.special.ndtr(z) ** (VOCAB - 1), z))


def test_common_draws_give_the_law_of_the_gaussian_trajectory() -> None:
    """P(z_s, z_t given x) of the argmax of common Gaussians, of `corrupt` with common draws, and by quadrature."""
    count = 100_000
    ratios = {"s": 1.7, "t": 0.6}  # signal over noise
    shown = {name: _shown(ratio) for name, ratio in ratios.items()}
    # Linear schedule: P(x) = alpha + (1 - alpha) / V with alpha = 1 - time.
    times = {name: 1 - (value - 1 / VOCAB) / (1 - 1 / VOCAB) for name, value in shown.items()}
    assert 0 < times["s"] < times["t"] < 1
    expected = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    expected[0, 0] = shown["t"]
    expected[0, 1:] = (shown["s"] - shown["t"]) / (VOCAB - 1)
    expected[range(1, VOCAB), range(1, VOCAB)] = (1 - shown["s"]) / (VOCAB - 1)
    noise = torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gaussian = {name: (noise + ratio * torch.eye(VOCAB)[0]).argmax(-1) for name, ratio in ratios.items()}
    process = make_process("uniform", VOCAB)
    draws = Draws.for_range(0, 0, 0, count)
    x = torch.zeros(count, 1, dtype=torch.int64)
    common = {
        name: process.corrupt(x, torch.full((count,), time, dtype=torch.float64), draws).squeeze(-1)
        for name, time in times.items()
    }
    for made in (gaussian, common):
        frequencies = torch.bincount(made["s"] * VOCAB + made["t"], minlength=VOCAB**2).view(VOCAB, VOCAB) / count
        # Six standard errors of a frequency.
        assert bool(((frequencies - expected).abs() <= 6 * (expected * (1 - expected) / count).sqrt()).all())


@pytest.mark.parametrize("name", ["uniform", "masked"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("chunk", [0, 7])
def test_the_loss_is_the_divergence_from_the_teacher_on_one_trajectory(name: str, divergence: str, chunk: int) -> None:
    game, student, teacher = _game(name, divergence=divergence, chunk_rows=chunk)
    batch, draws = _inputs()
    loss = game.loss(("student",), batch, draws).by_player["student"]
    loss.backward()
    (z_t, t, _), (z_s, s, _) = student.calls[0], teacher.calls[0]
    assert torch.equal(s, (t - 0.5).clamp(min=0))
    assert float(t.min()) >= 0.5
    at_t, at_s = (game.process.corrupt(batch.tokens, time, draws) for time in (t, s))
    assert torch.equal(at_t, z_t)
    assert torch.equal(at_s, z_s)
    # What is clean at t is clean at s.
    assert bool((z_s[z_t == batch.tokens] == batch.tokens[z_t == batch.tokens]).all())
    logits = student.logits.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(BATCH):
        for place in range(LENGTH):
            z, below = int(z_t[b, place]), int(z_s[b, place])
            if name == "masked" and z != VOCAB:
                continue
            sure = name == "masked" and below != VOCAB
            one_hot = torch.nn.functional.one_hot(torch.tensor(below), VOCAB + 1)[:VOCAB].double()
            theta = one_hot if sure else teacher.logits[place, below].detach().softmax(-1)
            log_p = logits[place, z].log_softmax(-1)
            if divergence == "forward_kl":
                total = total + (torch.special.xlogy(theta, theta) - theta * log_p).sum()
            else:
                total = total + (log_p.exp() * (log_p - theta.clamp_min(1e-6).log())).sum()
    total = total / (BATCH * LENGTH)
    total.backward()
    # The rows' weights are float32 numbers: 2^-24 each.
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=2**-22)
    assert student.logits.grad is not None
    assert logits.grad is not None
    assert float((student.logits.grad - logits.grad).abs().max()) < 2**-22 * float(logits.grad.abs().max())
    assert teacher.logits.grad is None


def test_steps_double_from_round_to_round_and_the_average_teaches() -> None:
    game, student, teacher = _game(rounds=3, round_average=0.5)
    mean = student.logits.detach().clone()
    for step in range(9):
        s, t = game.draw_times(_inputs(step)[1])
        length: Tensor = t - s
        assert torch.allclose(length, torch.full_like(length, 1 / (2 * 2 ** (2 - step // 3))), rtol=0, atol=1e-12)
        with torch.no_grad():
            student.logits += 1
            mean = mean.lerp(student.logits, 0.5)
        game.after_update(step)
        if step == 2:
            held = game.rounds.teacher
            assert isinstance(held, Free)
            assert held is not teacher
            torch.testing.assert_close(held.logits.detach(), mean, rtol=0, atol=1e-14)
