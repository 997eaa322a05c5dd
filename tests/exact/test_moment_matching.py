"""D-MMD's losses against closed forms, on denoisers whose logits are free parameters."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from worlds import Free, bayes_posterior, forward_matrix, make_process

from dmmd_core import Batch, Draws, shape_log_probs
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_samplers.ancestral import Ancestral

VOCAB, LENGTH, BATCH = 4, 3, 64


def _game(
    name: str, process_params: dict[str, object] | None = None, **params: object
) -> tuple[MomentMatching, Free, Free, Free]:
    process = make_process(name, VOCAB, **(process_params or {}))
    student, teacher, auxiliary = (Free(process, LENGTH, seed) for seed in range(3))
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


@pytest.mark.parametrize(("name", "process_params"), [("masked", {}), ("masked", {"weight": "elbo"}), ("uniform", {})])
def test_students_gradient_is_the_closed_form(name: str, process_params: dict[str, object]) -> None:
    game, student, teacher, auxiliary = _game(name, process_params)
    with torch.no_grad():  # probabilities below the floor, on either side
        teacher.logits[..., 0] -= 40
        auxiliary.logits[..., 1] -= 40
    batch, draws = _inputs()
    game.loss(("student",), batch, draws).by_player["student"].backward()
    s, t, z_t, z_s = _noisy(game, batch, draws)
    expected = torch.zeros_like(student.logits)
    floor = math.log(1e-6)
    weight = 1 / s if process_params else torch.ones_like(s)  # linear schedule: -alpha' / (1 - alpha) = 1 / s
    assert float(s.min()) > 1e-3, "else the ELBO weight is bounded"
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
                    expected[l, z_t[b, l]] += weight[b] * gradient / (BATCH * LENGTH)
    assert student.logits.grad is not None
    # The rows' weights are float32 numbers: 2^-24 each, relative to terms no larger than the largest gradient.
    assert float((student.logits.grad - expected).abs().max()) < 2**-23 * float(expected.abs().max())
    assert float(expected.abs().max()) > 1e-3
    assert teacher.logits.grad is None
    assert auxiliary.logits.grad is None


@pytest.mark.parametrize("turn", [("student",), ("auxiliary",), ("student", "auxiliary")], ids="-".join)
def test_each_network_is_called_once_at_its_own_time_and_keeps_a_graph_only_on_its_turn(turn: tuple[str, ...]) -> None:
    game, student, teacher, auxiliary = _game("uniform", auxiliary_target="posterior")
    batch, draws = _inputs()
    labels = torch.arange(BATCH)
    s, t, z_t, z_s = _noisy(game, batch, draws)
    student.calls.clear()
    student.gradients.clear()
    game.loss(turn, Batch(batch.tokens, labels), draws)
    for network, z, time in ((student, z_t, t), (teacher, z_s, s), (auxiliary, z_s, s)):
        ((given_z, given_time, condition),) = network.calls
        assert torch.equal(given_z, z)
        assert torch.equal(given_time, time)
        assert condition is not None
        assert condition.label is labels
    assert teacher.gradients == {False}
    assert auxiliary.gradients == {"auxiliary" in turn}
    # The student is also read to draw x, without a graph.
    assert student.gradients == ({True, False} if "student" in turn else {False})


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


def _marginals(game: MomentMatching, student: Free, s: float, t: float) -> Tensor:
    """E_student[x | z_s] position by position, ``[length, inputs, vocab]``, by enumeration of z_t and x.

    Data are uniform and `Free` looks at one position at a time, so that positions are independent.
    """
    process = game.process
    marginal = forward_matrix(process, 0.0, t)[:VOCAB].mean(0)
    joint = torch.zeros(LENGTH, process.num_inputs, VOCAB, dtype=torch.float64)
    for z_t in range(process.num_inputs):
        row = torch.full((1, LENGTH), z_t)
        p = student(row, torch.tensor([t], dtype=torch.float64)).log_probs().exp().detach()
        for x in range(VOCAB):
            if forward_matrix(process, 0.0, t)[x, z_t] > 0:
                joint[..., x] += marginal[z_t] * p[:, x, None] * bayes_posterior(process, x, z_t, s, t)
    return joint / joint.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "target"), [("masked", "soft"), ("masked", "hard"), ("uniform", "hard"), ("uniform", "posterior")]
)
def test_auxiliary_rests_at_the_average_of_teacher_and_students_mean_given_z_s(
    monkeypatch: pytest.MonkeyPatch, name: str, target: str
) -> None:
    """And, with E_student[x | z_s] by enumeration, nowhere else: not at the teacher, nor at E_student."""
    game, student, teacher, auxiliary = _game(name, auxiliary_target=target)
    s, t = 0.4, 0.65
    monkeypatch.setattr(
        game, "draw_times", lambda draws, shape: tuple(torch.full((BATCH,), one, dtype=torch.float64) for one in (s, t))
    )
    rows = [VOCAB] if name == "masked" else list(range(VOCAB))
    with torch.no_grad():
        mean = _marginals(game, student, s, t)[:, rows]
        theta = teacher.logits[:, rows].softmax(-1)
    steps = 200
    scores = {}
    for place, phi in {"average": (mean + theta) / 2, "teacher": theta, "student": mean}.items():
        with torch.no_grad():
            auxiliary.logits[:, rows] = phi.log()
        gradients = []
        for step in range(steps):
            loss = game.loss(("auxiliary",), *_inputs(step)).by_player["auxiliary"]
            gradients.append(torch.autograd.grad(loss, auxiliary.logits)[0][:, rows])
        stacked = torch.stack(gradients)
        scores[place] = float((stacked.mean(0) / (stacked.std(0) / math.sqrt(steps) + 1e-12)).abs().max())
    assert scores["average"] < 6  # standard errors of a mean of 200 independent gradients
    assert scores["teacher"] > 12
    assert scores["student"] > 12


def test_a_soft_target_needs_a_process_that_makes_it_exact() -> None:
    (needed,) = MomentMatching.requires(MomentMatching.Config(auxiliary_target="soft"))
    assert (needed.role, needed.capability) == ("process", "soft_targets")
    assert needed.capability in type(make_process("masked")).provides(make_process("masked").config)  # type: ignore[attr-defined]
    assert needed.capability not in type(make_process("uniform")).provides(None)
    assert not MomentMatching.requires(MomentMatching.Config(auxiliary_target="posterior"))


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


def test_soft_and_posterior_targets_coincide_for_the_masked_process_alone() -> None:
    for name in ("masked", "uniform"):
        values = []
        for target in ("soft", "posterior"):
            game, *_ = _game(name, auxiliary_target=target)
            values.append(float(game.loss(("auxiliary",), *_inputs()).by_player["auxiliary"].detach()))
        difference = abs(values[0] - values[1])
        assert difference < 1e-12 if name == "masked" else difference > 1e-4


def test_metrics_are_the_students_entropy_and_half_the_distance_of_teacher_and_auxiliary() -> None:
    game, student, teacher, auxiliary = _game("uniform")
    batch, draws = _inputs()
    metrics = game.loss(("student", "auxiliary"), batch, draws).metrics
    s, t, z_t, z_s = _noisy(game, batch, draws)
    with torch.no_grad():
        p = student(z_t, t).log_probs().exp()
        theta, phi = teacher(z_s, s).log_probs().exp(), auxiliary(z_s, s).log_probs().exp()
    # The rows' weights are float32 numbers.
    assert float(metrics["student_entropy"]) == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=2**-23)
    assert float(metrics["teacher_auxiliary_gap"]) == pytest.approx(
        float((theta - phi).abs().sum(-1).mean() / 2), rel=2**-23
    )


def test_times_on_the_grid_are_those_of_the_sampler() -> None:
    game, *_ = _game("uniform", times="grid")
    s, t = game.draw_times(Draws.for_range(0, 0, 0, 4000))
    steps = (t * game.num_steps).round()
    assert torch.equal(t, steps / game.num_steps), "every t is a time that a sampler of k steps visits"
    assert bool((s < t).all())
    assert bool((t - s <= 1 / game.num_steps).all())
    assert torch.bincount(steps.long()).tolist()[0] == 0
    counts = torch.bincount(steps.long())[1:].double()
    assert torch.allclose(counts / 4000, torch.full_like(counts, 1 / game.num_steps), atol=0.03)
    ends = torch.tensor([1e-12, 0.25, 0.5, 1 - 1e-12], dtype=torch.float64)
    game.num_steps = 3
    fake = type("Fake", (), {"uniform": lambda self, stream, shape: ends})()
    assert game.draw_times(fake)[1].tolist() == pytest.approx([1 / 3, 1 / 3, 2 / 3, 1.0])


def test_times_on_the_grid_follow_the_steps_of_the_sampler() -> None:
    """With steps by the cosine: t = cos(pi i / (2k)), each as often as another, and s within the step from it."""
    sampler = Ancestral(Ancestral.Config(times="cosine"), process=make_process("masked", VOCAB), length=LENGTH)
    game, *_ = _game("masked", times="grid")
    game.step_times = sampler.step_times
    s, t = game.draw_times(Draws.for_range(0, 0, 0, 4000))
    times = [math.cos(0.5 * math.pi * step / 4) for step in range(5)]
    for start, end in itertools.pairwise(times):
        here = (t - start).abs() < 1e-12
        assert float(here.double().mean()) == pytest.approx(0.25, abs=6 * math.sqrt(0.19 / 4000))
        assert bool(((s[here] <= start) & (s[here] >= end - 1e-12)).all())


def test_times_are_those_of_algorithm_1() -> None:
    game, *_ = _game("masked")
    s, t = game.draw_times(Draws.for_range(0, 0, 0, 100_000))
    assert bool((s <= t).all())
    assert bool((t <= 1).all())
    assert float((t - s).max()) <= 1 / 4
    # Chi-square with 19 degrees of freedom: mean 19, standard deviation sqrt(38); six of them.
    counts = torch.histc(s, 20, 0, 1)
    assert abs(float(((counts - 5000) ** 2 / 5000).sum()) - 19) < 6 * math.sqrt(38)
    free = s < 0.75  # where the end of the axis cuts nothing off, delta is uniform and independent of s
    inner = (t - s)[free] * 4
    counts, expected = torch.histc(inner, 20, 0, 1), len(inner) / 20
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 19) < 6 * math.sqrt(38)
    assert abs(float(torch.stack((s[free], inner)).corrcoef()[0, 1])) < 6 / math.sqrt(len(inner))
    assert float((t == 1).double().mean()) == pytest.approx(0.125, abs=6 * math.sqrt(0.11 / 100_000))


def test_turns_alternate_or_coincide() -> None:
    game, *_ = _game("masked", turns="alternate")
    assert [game.turn(step) for step in range(3)] == [("student",), ("auxiliary",), ("student",)]
    game, *_ = _game("masked")
    assert game.turn(5) == ("student", "auxiliary")


def test_shaping_applies_temperature_first_and_lowers_by_a_constant() -> None:
    p = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64)
    shaped = shape_log_probs(p.log(), temperature=0.5, top_p=0.9, lowering=2.0)
    sharp = (p**2 / (p**2).sum()).log()  # 0.725, 0.181, 0.065, 0.029: two reach 0.9, of p itself it takes three
    lowered = sharp - torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    assert torch.allclose(shaped, lowered.log_softmax(-1), rtol=0, atol=1e-12)
    assert bool(shaped.isfinite().all())
    # In any order of tokens, and when nothing reaches the nucleus but the first token.
    order = torch.tensor([2, 0, 3, 1])
    assert torch.allclose(shape_log_probs(p[:, order].log(), 0.5, 0.9, 2.0), shaped[:, order], rtol=0, atol=1e-15)
    tiny = shape_log_probs(p.log(), top_p=0.01, lowering=1.5)
    assert torch.allclose(tiny, (p.log() - torch.tensor([0, 1.5, 1.5, 1.5])).log_softmax(-1), rtol=0, atol=1e-15)
    # The smallest set that reaches the mass: exactly reached is reached.
    halves = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64)
    lowered = halves.log() - torch.tensor([0, 2.0, 2.0])
    assert torch.allclose(shape_log_probs(halves.log(), top_p=0.5), lowered.log_softmax(-1), rtol=0, atol=1e-15)
    assert torch.equal(shape_log_probs(p.log()), p.log())


def test_extreme_shaping_is_finite_in_float32() -> None:
    log_probs = (20 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    shaped = shape_log_probs(log_probs, temperature=0.05, top_p=0.01)
    assert bool(shaped.isfinite().all())
    assert torch.allclose(shaped.exp().sum(-1), torch.ones(50), rtol=0, atol=1e-6)
    assert torch.equal(shaped.argmax(-1), log_probs.argmax(-1))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_extreme_shaping_trains_without_nan(name: str) -> None:
    game, student, teacher, auxiliary = _game(name, temperature=0.05, top_p=0.01)
    with torch.no_grad():
        teacher.logits[..., 0] = -torch.inf  # an exact teacher has true zeros
    losses = game.loss(("student", "auxiliary"), *_inputs()).by_player
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(bool(value.isfinite()) for value in losses.values())
    for module in (student, auxiliary):
        assert module.logits.grad is not None
        assert bool(module.logits.grad.isfinite().all())
