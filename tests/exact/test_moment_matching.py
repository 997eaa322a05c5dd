"""D-MMD's losses against closed forms, on denoisers whose logits are free parameters."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from worlds import make_process

from dmmd_core import Batch, Condition, Denoiser, Draws, Prediction, Process, TablePrediction, shape_log_probs
from dmmd_objectives.moment_matching import MomentMatching

VOCAB, LENGTH, BATCH = 4, 3, 64


class Free(Denoiser):
    """A denoiser with one free row of logits for every position and input id."""

    def __init__(self, process: Process, seed: int) -> None:
        super().__init__()
        self.process = process
        source = torch.Generator().manual_seed(seed)
        shape = (LENGTH, process.num_inputs, VOCAB)
        self.logits = nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64))

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        rows = self.logits[torch.arange(LENGTH), z_t].flatten(0, 1)
        times = t.unsqueeze(-1).expand_as(z_t).flatten()
        log_probs = self.process.clean_log_probs(rows, z_t.flatten(), times)
        return TablePrediction(log_probs.unflatten(0, z_t.shape))


def _game(name: str, **params: object) -> tuple[MomentMatching, Free, Free, Free]:
    process = make_process(name, VOCAB)
    student, teacher, auxiliary = (Free(process, seed) for seed in range(3))
    config = MomentMatching.Config(**params)  # type: ignore[arg-type]
    game = MomentMatching(
        config, process=process, network=student, teacher=teacher, copy_teacher=lambda: auxiliary, num_steps=4
    )
    return game, student, teacher, auxiliary


def _inputs(step: int = 0) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, step, 0, BATCH)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


def _noisy(game: MomentMatching, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step 1 and 2 of the algorithm again, as the objective makes them."""
    s, t = game.draw_times(draws)
    z_t = game.process.corrupt(batch.tokens, t, draws)
    with torch.no_grad():
        _, z_s = game._draw_z_s(game.student(z_t, t), z_t, s, t, draws)
    return s, t, z_t, z_s


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_students_gradient_is_the_closed_form(name: str) -> None:
    game, student, teacher, auxiliary = _game(name)
    batch, draws = _inputs()
    game.loss(("student",), batch, draws).by_player["student"].backward()
    s, t, z_t, z_s = _noisy(game, batch, draws)
    expected = torch.zeros_like(student.logits)
    floor = math.log(1e-6)
    with torch.no_grad():
        p = student(z_t, t).log_probs().exp().unflatten(0, z_t.shape)
        theta = teacher(z_s, s).log_probs().clamp_min(floor).unflatten(0, z_s.shape)
        phi = auxiliary(z_s, s).log_probs().clamp_min(floor).unflatten(0, z_s.shape)
        carries = game.process.rows_with_loss(z_s, s)
        for b in range(BATCH):
            for l in range(LENGTH):  # noqa: E741 - the paper's letter
                if carries[b, l]:
                    d = theta[b, l] - phi[b, l]
                    gradient = -p[b, l] * (d - (p[b, l] * d).sum())
                    expected[l, z_t[b, l]] += gradient / (BATCH * LENGTH)
    assert student.logits.grad is not None
    # The rows' weights are float32 numbers.
    assert torch.allclose(student.logits.grad, expected, rtol=1e-6, atol=1e-9)
    assert float(expected.abs().max()) > 1e-3
    assert teacher.logits.grad is None
    assert auxiliary.logits.grad is None


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_student_rests_where_auxiliary_equals_teacher(name: str) -> None:
    game, student, teacher, auxiliary = _game(name)
    auxiliary.load_state_dict(teacher.state_dict())
    game.loss(("student",), *_inputs()).by_player["student"].backward()
    assert student.logits.grad is not None
    assert float(student.logits.grad.abs().max()) == 0


def test_gradients_do_not_cross_between_players() -> None:
    game, student, teacher, auxiliary = _game("masked")
    losses = game.loss(("student", "auxiliary"), *_inputs()).by_player
    (through,) = torch.autograd.grad(losses["student"], auxiliary.logits, retain_graph=True, allow_unused=True)
    assert through is None or float(through.abs().max()) == 0
    (through,) = torch.autograd.grad(losses["auxiliary"], student.logits, retain_graph=True, allow_unused=True)
    assert through is None or float(through.abs().max()) == 0
    (through,) = torch.autograd.grad(sum(losses.values()), teacher.logits, allow_unused=True)  # type: ignore[arg-type]
    assert through is None


@pytest.mark.parametrize("chunk", [0, 5])
def test_both_turns_on_one_draw_are_the_alternate_turns_on_that_draw(chunk: int) -> None:
    game, student, _, auxiliary = _game("masked", auxiliary_target="soft", chunk_rows=chunk)
    batch, draws = _inputs()
    joint = game.loss(("student", "auxiliary"), batch, draws).by_player
    gradients = torch.autograd.grad(joint["student"] + joint["auxiliary"], (student.logits, auxiliary.logits))
    for turn, module, gradient in zip(("student", "auxiliary"), (student, auxiliary), gradients, strict=True):
        alone = game.loss((turn,), batch, draws).by_player
        assert list(alone) == [turn]
        assert torch.equal(alone[turn].detach(), joint[turn].detach())
        assert torch.allclose(torch.autograd.grad(alone[turn], module.logits)[0], gradient, rtol=1e-12, atol=1e-15)


def test_auxiliarys_optimum_is_the_average_of_its_two_targets() -> None:
    """At a fully masked sequence the targets are the student's and the teacher's probabilities."""
    game, student, teacher, auxiliary = _game("masked", auxiliary_target="soft")
    process = game.process
    log_theta, log_p = (m.logits[:, VOCAB].log_softmax(-1).detach() for m in (teacher, student))
    z = torch.full((LENGTH,), VOCAB)
    s = torch.full((LENGTH,), 0.5, dtype=torch.float64)
    optimizer = torch.optim.LBFGS([auxiliary.logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        log_phi = process.clean_log_probs(auxiliary.logits[:, VOCAB], z, s)
        loss = process.row_losses(log_p.exp(), log_phi, z, s) + process.row_losses(log_theta.exp(), log_phi, z, s)
        loss.sum().backward()
        return loss.sum()

    optimizer.step(closure)
    average = (log_p.exp() + log_theta.exp()) / 2
    assert torch.allclose(auxiliary.logits[:, VOCAB].softmax(-1).detach(), average, rtol=0, atol=1e-6)
    # And the objective's own loss is flat there: its gradient at that point vanishes on fully masked rows.
    with torch.no_grad():
        for position in range(LENGTH):
            auxiliary.logits[position, VOCAB] = average[position].log()
    batch, draws = _inputs()
    loss = game.loss(("auxiliary",), batch, draws).by_player["auxiliary"]
    (gradient,) = torch.autograd.grad(loss, auxiliary.logits)
    assert float(gradient.abs().max()) < 1e-8


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_all_auxiliary_targets_have_the_same_expectation(name: str) -> None:
    """Gradients of hard and posterior targets agree on average; the posterior's has less noise."""
    gradients: dict[str, Tensor] = {}
    for target in ("hard", "posterior"):
        game, _, _, auxiliary = _game(name, auxiliary_target=target)
        rows = []
        for step in range(300):
            loss = game.loss(("auxiliary",), *_inputs(step)).by_player["auxiliary"]
            rows.append(torch.autograd.grad(loss, auxiliary.logits)[0])
        gradients[target] = torch.stack(rows)
    # Both see the same z_s, so the difference of each step is noise of mean zero.
    difference = gradients["hard"] - gradients["posterior"]
    error = difference.std(0) / math.sqrt(300)
    assert bool((difference.mean(0).abs() <= 6 * error + 1e-12).all())  # six standard errors
    assert float(gradients["posterior"].var(0).sum()) < float(gradients["hard"].var(0).sum())


def test_soft_and_posterior_targets_coincide_for_the_masked_process() -> None:
    values = []
    for target in ("soft", "posterior"):
        game, *_ = _game("masked", auxiliary_target=target)
        values.append(game.loss(("auxiliary",), *_inputs()).by_player["auxiliary"].detach())
    assert torch.allclose(values[0], values[1], rtol=1e-12, atol=0)


def test_times_are_those_of_algorithm_1() -> None:
    game, *_ = _game("masked")
    s, t = game.draw_times(Draws.for_range(0, 0, 0, 100_000))
    assert bool((s <= t).all())
    assert bool((t <= 1).all())
    assert float((t - s).max()) <= 1 / 4
    counts = torch.histc(s, 20, 0, 1)
    assert float(((counts - 5000) ** 2 / 5000).sum()) < 19 + 6 * math.sqrt(38)  # chi-square, 19 degrees of freedom
    inner = (t - s)[s < 0.75] * 4  # where the end of the axis cuts nothing off, delta is uniform
    assert abs(float(inner.mean()) - 0.5) < 6 / math.sqrt(12 * len(inner))
    assert float((t == 1).double().mean()) == pytest.approx(0.125, abs=6 * math.sqrt(0.11 / 100_000))


def test_turns_alternate_or_coincide() -> None:
    game, *_ = _game("masked", turns="alternate")
    assert [game.turn(step) for step in range(3)] == [("student",), ("auxiliary",), ("student",)]
    game, *_ = _game("masked")
    assert game.turn(5) == ("student", "auxiliary")


def test_shaping_applies_temperature_first_and_lowers_by_a_constant() -> None:
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
    shaped = shape_log_probs(p.log(), temperature=0.5, top_p=0.9, lowering=2.0)
    sharp = (p**2 / (p**2).sum()).log()  # 0.72, 0.18, 0.07, 0.03: the nucleus of 0.9 is the first two... and exactly
    assert [round(float(v), 3) for v in sharp.exp()[0]] == [0.725, 0.181, 0.065, 0.029]
    lowered = sharp - torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert torch.allclose(shaped, lowered.log_softmax(-1), rtol=0, atol=1e-12)
    assert bool(shaped.isfinite().all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_extreme_shaping_trains_without_nan(name: str) -> None:
    game, student, _, auxiliary = _game(name, temperature=0.05, top_p=0.01)
    losses = game.loss(("student", "auxiliary"), *_inputs()).by_player
    sum(losses.values()).backward()  # type: ignore[union-attr]
    for module in (student, auxiliary):
        assert module.logits.grad is not None
        assert bool(module.logits.grad.isfinite().all())
