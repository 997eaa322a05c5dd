"""Di[M]O and IDLM against closed forms and enumeration, and beside D-MMD, on denoisers with free logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from worlds import Free, make_process

from dmmd_backbones.mlp import MLP
from dmmd_core import Batch, Draws, NetworkPrediction
from dmmd_generators.partly_random import PartlyRandom
from dmmd_objectives.dimo import DiMO, jeffreys, score_gradient
from dmmd_objectives.fake import FakeGame
from dmmd_objectives.idlm import InverseDistillation
from dmmd_objectives.moment_matching import MomentMatching

VOCAB, LENGTH, BATCH = 4, 3, 64
FLOOR = math.log(1e-6)


def _game(cls: type[Any], weight: str = "flat", **params: object) -> tuple[Any, Free, Free, Free]:
    process = make_process("masked", VOCAB, weight=weight)
    student, teacher, auxiliary = (Free(process, LENGTH, seed) for seed in range(3))
    networks = {"network": student, "teacher": teacher, "copy_teacher": lambda: auxiliary}
    more = {"num_steps": 1} if cls is MomentMatching else {"length": LENGTH}
    return cls(cls.Config(**params), process=process, **networks, **more), student, teacher, auxiliary


def _inputs(step: int = 0, batch: int = BATCH) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, step, 0, batch)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


@pytest.mark.parametrize("coefficient", [-0.2, 0.0, 0.5, 1.0])
def test_the_gradient_is_the_jeffreys_divergences_in_the_auxiliarys_logits(coefficient: float) -> None:
    source = torch.Generator().manual_seed(0)
    log_theta = torch.randn(5, VOCAB, generator=source, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(5, VOCAB, generator=source, dtype=torch.float64).requires_grad_(True)
    theta, phi = log_theta.exp(), logits.softmax(-1)
    divergence = (1 - coefficient) * (theta * (log_theta - phi.log())).sum(-1) + coefficient * (
        phi * (phi.log() - log_theta)
    ).sum(-1)
    value, got = jeffreys(log_theta, logits.detach().log_softmax(-1), coefficient, FLOOR)
    torch.testing.assert_close(value, divergence.detach())
    (expected,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def _rows(game: FakeGame, student: Free, auxiliary: Free) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z_t, z_s, and weights of all positions that carry a loss, from the calls of the networks."""
    z_t, _, _ = student.calls[-1]
    z_s, s, _ = auxiliary.calls[-1]
    weight = game.process.loss_weight(s).unsqueeze(-1) * (z_s == VOCAB) / (BATCH * LENGTH)
    return z_t, z_s, s, weight


@pytest.mark.parametrize("weight", ["flat", "elbo"])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("method", [DiMO, InverseDistillation], ids=["dimo", "idlm"])
def test_gradients_and_values_are_the_closed_forms(method: type[Any], chunk: int, weight: str) -> None:
    game, student, teacher, auxiliary = _game(method, weight, turns="joint", chunk_rows=chunk)
    with torch.no_grad():  # probabilities below the floor, on either side
        teacher.logits[..., 0] -= 40
        auxiliary.logits[..., 1] -= 40
    made = game.loss(("student", "auxiliary"), *_inputs())
    sum(made.by_player.values()).backward()
    z_t, z_s, s, weights = _rows(game, student, auxiliary)
    assert torch.equal(teacher.calls[-1][0], z_s)
    assert torch.equal(teacher.calls[-1][1], s)
    x = torch.where(z_s == VOCAB, -1, z_s)
    push, pull = torch.zeros_like(student.logits), torch.zeros_like(auxiliary.logits)
    student_loss = auxiliary_loss = 0.0
    drawn = _draws_of(game, student, z_t)
    for b in range(BATCH):
        for place in range(LENGTH):
            w = float(weights[b, place])
            assert x[b, place] in (-1, drawn[b, place])
            if w == 0:
                continue
            log_theta = teacher.logits[place, VOCAB].detach().log_softmax(-1).clamp_min(FLOOR)
            log_phi = auxiliary.logits[place, VOCAB].detach().log_softmax(-1)
            z = int(z_t[b, place])
            p = student.logits[place, z].detach().softmax(-1) if z == VOCAB else torch.eye(VOCAB)[z].double()
            if method is DiMO:
                target = torch.eye(VOCAB, dtype=torch.float64)[drawn[b, place]]
                theta, phi = teacher.logits[place, VOCAB].detach().softmax(-1), log_phi.exp()
                d = log_theta - log_phi.clamp_min(FLOOR)
                gradient = 1.2 * (phi - theta) + 0.2 * phi * (d - (phi * d).sum())
                student_loss += w * float((1.2 * theta * d + 0.2 * phi * d).sum())
            else:
                target = p
                d = log_theta - log_phi.clamp_min(FLOOR)
                gradient = -p * (d - (p * d).sum())
                student_loss -= w * float((p * d).sum())
            if z == VOCAB:
                push[place, VOCAB] += w * gradient
            pull[place, VOCAB] += w * (log_phi.exp() - target)
            auxiliary_loss -= w * float((target * log_phi).sum())
    # The rows' weights are float32 numbers: 2^-24 each.
    assert float(made.by_player["student"].detach()) == pytest.approx(student_loss, rel=2**-20)
    assert float(made.by_player["auxiliary"].detach()) == pytest.approx(auxiliary_loss, rel=2**-20)
    for network, expected in ((student, push), (auxiliary, pull)):
        assert network.logits.grad is not None
        assert float((network.logits.grad - expected).abs().max()) < 2**-20 * float(expected.abs().max())
    assert teacher.logits.grad is None
    assert teacher.gradients == {False}


def _draws_of(game: FakeGame, student: Free, z_t: Tensor) -> Tensor:
    """The student's tokens once more: the first whose distribution function passes the uniform number."""
    uniform = _inputs()[1].uniform("x", (LENGTH,))
    x = z_t.clone()
    for b, place in (z_t == VOCAB).nonzero().tolist():
        cdf = student.logits[place, VOCAB].detach().softmax(-1).cumsum(0)
        x[b, place] = int((cdf < uniform[b, place]).sum())
    return x


def test_where_the_students_start() -> None:
    game, _, _, _ = _game(DiMO)
    z, t = game.start(*_inputs())
    assert bool((z == VOCAB).all())
    assert t.tolist() == [1.0] * BATCH
    game, _, _, auxiliary = _game(InverseDistillation)
    batch, draws = _inputs(batch=4000)
    z, t = game.start(batch, draws)
    assert bool(((z == batch.tokens) | (z == VOCAB)).all())
    game.loss(("student",), batch, draws)
    s = auxiliary.calls[0][1]
    # Independent uniform times: correlation of standard error 1 / sqrt(4000); six of them.
    assert abs(float(torch.stack((s, t)).corrcoef()[0, 1])) < 6 / 4000**0.5
    # And the noise at s is independent of that at t: of the positions masked at t a share s is masked at s.
    z_s = auxiliary.calls[0][0]
    masked = ((z_s == VOCAB).double() - s.unsqueeze(-1))[z == VOCAB]
    assert abs(float(masked.sum())) < 6 * math.sqrt(masked.numel() / 4)


def _students_gradient(cls: type[Any], params: dict[str, object], auxiliary_is_student: bool = False) -> Tensor:
    """Gradient in the student's logits at [MASK], averaged over the rows that carry a loss, ``[length, vocab]``."""
    game, student, teacher, auxiliary = _game(cls, **params)
    if auxiliary_is_student:
        auxiliary.load_state_dict(student.state_dict())
    if cls is MomentMatching:  # from pure noise, as the one-step student of Di[M]O
        game.process.corrupt = lambda x, t, draws: torch.full_like(x, VOCAB)
    game.loss(("student",), *_inputs()).by_player["student"].backward()
    z_s = auxiliary.calls[-1][0]
    assert student.logits.grad is not None
    assert teacher.logits.grad is None
    return student.logits.grad[:, VOCAB] * (BATCH * LENGTH) / (z_s == VOCAB).sum(0).unsqueeze(-1)


def test_dmmd_and_the_reverse_branch_of_dimo_differ_in_one_factor() -> None:
    """``w_j (e_j - sum_c w_c e_c)``: w is the student's p for D-MMD and the auxiliary's phi for Di[M]O."""
    student, teacher, auxiliary = (Free(make_process("masked", VOCAB), LENGTH, seed) for seed in range(3))
    p, theta, phi = (m.logits[:, VOCAB].detach().softmax(-1) for m in (student, teacher, auxiliary))
    e = phi.log() - theta.log()
    ours = _students_gradient(MomentMatching, {})
    theirs = _students_gradient(DiMO, {"jeffreys_coefficient": 1.0})
    for gradient, w in ((ours, p), (theirs, phi)):
        expected = w * (e - (w * e).sum(-1, keepdim=True))
        # Weights of the rows are float32 numbers.
        torch.testing.assert_close(gradient, expected, rtol=2**-20, atol=2**-22)
        torch.testing.assert_close(score_gradient(w, theta.log(), phi.log()), expected)
    # Divided by its own factor, each is the same function of the token up to a constant.
    gap = ours / p - theirs / phi
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), rtol=0, atol=1e-5)
    assert float((ours - theirs).abs().max()) > 0.05, "the factor matters"


def test_dmmd_and_the_reverse_branch_of_dimo_agree_where_the_auxiliary_is_the_student() -> None:
    ours = _students_gradient(MomentMatching, {}, auxiliary_is_student=True)
    theirs = _students_gradient(DiMO, {"jeffreys_coefficient": 1.0}, auxiliary_is_student=True)
    torch.testing.assert_close(ours, theirs, rtol=2**-20, atol=2**-22)


@pytest.mark.parametrize("method", [DiMO, InverseDistillation], ids=["dimo", "idlm"])
def test_the_student_rests_where_the_auxiliary_is_the_teacher(method: type[Any]) -> None:
    game, student, teacher, auxiliary = _game(method)
    auxiliary.load_state_dict(teacher.state_dict())
    game.loss(("student",), *_inputs()).by_player["student"].backward()
    assert student.logits.grad is not None
    # Sums of the auxiliary's probabilities are one to rounding.
    assert float(student.logits.grad.abs().max()) < 1e-15


@pytest.mark.parametrize("method", [DiMO, InverseDistillation], ids=["dimo", "idlm"])
def test_the_auxiliary_rests_at_the_students_mean_and_not_at_the_average_with_the_teacher(method: type[Any]) -> None:
    """Data are uniform and `Free` looks at one position alone: E_student[x | masked at s] by hand."""
    game, student, teacher, auxiliary = _game(method)
    p = student.logits[:, VOCAB].detach().softmax(-1)
    # IDLM: the position was masked at t ~ U(0, 1) with probability 1/2 and drawn from p, else it is a data token.
    mean = p if method is DiMO else (p + 1 / VOCAB) / 2
    gradients = {}
    for name, phi in (("mean", mean), ("average", (mean + teacher.logits[:, VOCAB].detach().softmax(-1)) / 2)):
        with torch.no_grad():
            auxiliary.logits[:, VOCAB] = phi.log()
        parts = []
        for step in range(200):
            loss = game.loss(("auxiliary",), *_inputs(step)).by_player["auxiliary"]
            parts.append(torch.autograd.grad(loss, auxiliary.logits)[0][:, VOCAB])
        stacked = torch.stack(parts)
        gradients[name] = stacked.mean(0) / (stacked.std(0) / 200**0.5)
    assert float(gradients["mean"].abs().max()) < 5  # standard errors
    assert float(gradients["average"].abs().max()) > 20


def test_turns_follow_the_number_of_auxiliary_turns() -> None:
    game, _, _, _ = _game(DiMO, auxiliary_turns=2)
    assert [game.turn(step) for step in range(6)] == [("auxiliary",), ("auxiliary",), ("student",)] * 2
    game, _, _, _ = _game(DiMO, turns="joint", auxiliary_turns=1)
    assert game.turn(0) == game.turn(1) == ("student", "auxiliary")
    game, _, _, _ = _game(DiMO, turns="joint", auxiliary_turns=2)
    assert [game.turn(step) for step in range(3)] == [("auxiliary",), ("auxiliary",), ("student", "auxiliary")]


def test_partly_random_students_show_random_tokens_and_draw_all_that_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    process = make_process("masked", VOCAB)
    backbone = MLP(
        MLP.Config(width=8, depth=1, embedding_width=6), num_inputs=VOCAB + 1, vocab_size=VOCAB, length=LENGTH
    )
    student = PartlyRandom(PartlyRandom.Config(masked_share=0.6, width=5), backbone=backbone, process=process, length=3)
    shown: list[Tensor] = []
    features = backbone.features

    def spy(z: Tensor, *arguments: Any) -> Tensor:
        shown.append(z)
        return features(z, *arguments)

    monkeypatch.setattr(backbone, "features", spy)
    draws = Draws.for_range(0, 0, 0, 4000)
    z = process.prior_sample(LENGTH, draws)
    z[:, 0] = 2
    prediction = student(z, torch.ones(4000), None, student.draw_latent(draws))
    assert isinstance(prediction, NetworkPrediction)
    assert bool((shown[0][:, 0] == 2).all())
    counts = torch.bincount(shown[0][:, 1:].flatten(), minlength=VOCAB + 1).double()
    expected = 8000 * torch.tensor([0.1] * VOCAB + [0.6], dtype=torch.float64)
    # Chi-square with 4 degrees of freedom: mean 4, standard deviation sqrt(8); six of them.
    assert float(((counts - expected) ** 2 / expected).sum()) < 4 + 6 * 8**0.5
    probs = prediction.log_probs().exp().view(4000, LENGTH, VOCAB)
    assert bool((probs[:, 0, 2] == 1).all())
    assert bool((probs[:, 1:] > 0).all()), "a shown random token is no known token"
