"""Self-distillation through time against plain loops and enumeration, on denoisers with free logits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from worlds import Free, make_process

from dmmd_core import Batch, Draws, FieldError, Losses, Prediction, TablePrediction, per_position
from dmmd_objectives.sdtt import SelfDistillation

VOCAB, LENGTH, BATCH = 4, 3, 64


def _game(
    *, num_steps: int = 2, training_steps: int = 10, weight: str = "flat", **params: object
) -> tuple[SelfDistillation, Free, Free]:
    process = make_process("masked", VOCAB, weight=weight)
    student, teacher = Free(process, LENGTH, 0), Free(process, LENGTH, 1)
    config = SelfDistillation.Config(**{"rounds": 1, **params})  # type: ignore[arg-type]
    game = SelfDistillation(
        config, process=process, network=student, teacher=teacher, num_steps=num_steps, training_steps=training_steps
    )
    return game, student, teacher


def _inputs(step: int = 0, batch: int = BATCH) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, step, 0, batch)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


def _play(game: SelfDistillation, step: int = 0) -> Losses:
    return game.loss(("student",), *_inputs(step))


def test_the_teachers_times_are_evenly_spaced_from_t_to_s() -> None:
    game, _, _ = _game(teacher_steps=4, num_steps=2)
    s, t = torch.tensor([0.25, 0.5], dtype=torch.float64), torch.tensor([0.75, 1.0], dtype=torch.float64)
    for step, times in enumerate(game.teacher_times(s, t)):
        # t u + s (1 - u) with u = 1, 3/4, ...; with 1 - t in the place of 1 - u it would not even begin at t.
        assert times.tolist() == [0.75 - 0.125 * step, 1.0 - 0.125 * step]


@pytest.mark.parametrize("times", ["uniform", "grid"])
def test_a_students_step_has_the_length_of_its_round(times: str) -> None:
    game, _, _ = _game(num_steps=2, rounds=3, teacher_steps=2, training_steps=30, times=times)
    for end, steps in ((9, 8), (19, 4), (29, 2)):
        assert game.student_steps() == steps
        s, t = game.draw_times(_inputs(end)[1])
        assert torch.equal(s, (t - 1 / steps).clamp(min=0))
        assert float(t.min()) > 0
        if times == "grid":
            assert torch.equal((t * steps).round() / steps, t)
            assert set((t * steps).round().long().tolist()) == set(range(1, steps + 1))
        game.after_update(end)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "total_variation"])
@pytest.mark.parametrize("chunk", [0, 7])
@pytest.mark.parametrize("weight", ["flat", "elbo"])
def test_the_loss_is_the_divergence_from_the_step_that_unmasked_each_position(
    divergence: str, chunk: int, weight: str
) -> None:
    game, student, teacher = _game(teacher_steps=3, divergence=divergence, chunk_rows=chunk, weight=weight)
    with torch.no_grad():
        teacher.logits[..., 0] -= 40  # a probability below the floor
    loss = _play(game).by_player["student"]
    loss.backward()
    (z_t, t, _) = student.calls[0]
    walked = [call[0] for call in teacher.calls]
    times = [call[1] for call in teacher.calls]
    assert torch.equal(walked[0], z_t)
    assert len(walked) == 3
    s, _ = game.draw_times(_inputs()[1])
    for step, time in enumerate(times):
        torch.testing.assert_close(time, t + (s - t) * step / 3, rtol=0, atol=1e-15)
    logits = student.logits.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    seen = set()
    for b in range(BATCH):
        for place in range(LENGTH):
            if int(z_t[b, place]) != VOCAB:
                continue
            # `Free` looks at one position alone, so that its row says VOCAB as long as it is masked.
            alive = sum(int(z[b, place]) == VOCAB for z in walked)
            seen.add(alive)
            log_target = teacher.logits[place, VOCAB].detach().log_softmax(-1)
            log_p = logits[place, VOCAB].log_softmax(-1)
            w = 1 / float(t[b]) if weight == "elbo" else 1.0  # linear schedule: -alpha' / (1 - alpha) = 1 / t
            if divergence == "reverse_kl":
                total = total + w * (log_p.exp() * (log_p - log_target.clamp_min(math.log(1e-6)))).sum()
            elif divergence == "forward_kl":
                total = total + w * (log_target.exp() * (log_target - log_p)).sum()
            else:
                total = total + w * (log_p.exp() - log_target.exp()).abs().sum() / 2
    assert seen == {1, 2, 3}, "positions are unmasked at every step"
    total = total / (BATCH * LENGTH)
    total.backward()
    # The rows' weights are float32 numbers: 2^-24 each.
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=2**-22)
    assert student.logits.grad is not None
    assert logits.grad is not None
    assert float((student.logits.grad - logits.grad).abs().max()) < 2**-22 * float(logits.grad.abs().max())
    assert teacher.logits.grad is None
    assert teacher.gradients == {False}


def test_targets_are_those_of_the_step_that_unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that prefers another token at every step."""
    game, student, teacher = _game(teacher_steps=3, num_steps=1, divergence="forward_kl")
    told: list[Tensor] = []

    def forward(z_t: Tensor, t: Tensor, condition: object = None, latent: object = None) -> Prediction:
        told.append(z_t)
        logits = torch.zeros(*z_t.shape, VOCAB, dtype=torch.float64)
        logits[..., len(told) - 1] = 3.0  # step 0 prefers token 0, and so on
        rows = game.process.clean_log_probs(logits.flatten(0, 1), z_t.flatten(), per_position(t, z_t).flatten())
        return TablePrediction(rows.unflatten(0, z_t.shape))

    monkeypatch.setattr(teacher, "forward", forward)
    loss = float(_play(game).by_player["student"].detach())
    z_t = student.calls[0][0]
    total = 0.0
    for b in range(BATCH):
        for place in range(LENGTH):
            if int(z_t[b, place]) == VOCAB:
                step = sum(int(z[b, place]) == VOCAB for z in told) - 1  # the last one it was masked at
                target = torch.nn.functional.one_hot(torch.tensor(step), VOCAB).double().mul(3).log_softmax(-1)
                log_p = student.logits[place, VOCAB].detach().log_softmax(-1)
                total += float((target.exp() * (target - log_p)).sum())
    assert loss == pytest.approx(total / (BATCH * LENGTH), rel=2**-22)


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_the_student_becomes_the_teacher_after_every_round(average: float) -> None:
    game, student, teacher = _game(rounds=3, training_steps=7, round_average=average)
    assert game.rounds.teacher is teacher
    mean = copy.deepcopy(student.logits.detach())
    kept = {}
    for step in range(7):
        with torch.no_grad():
            student.logits += 1
            mean = mean.lerp(student.logits, 1 - average)
        game.after_update(step)
        kept[step] = mean.clone()
        # Rounds of a third of seven steps each: they end after steps 3, 5 and 7.
        assert game.rounds.round == (step >= 2) + (step >= 4)
        if game.rounds.round:
            held = game.rounds.teacher
            assert isinstance(held, Free)
            assert held is not student
            torch.testing.assert_close(held.logits.detach(), kept[2 if step < 4 else 4], rtol=0, atol=1e-14)
    _play(game)
    assert not teacher.calls
    assert set(game.checkpointed()) == {"former_student"} | ({"student_average"} if average else set())


def test_a_resumed_game_goes_on_with_the_teacher_it_had() -> None:
    game, student, _ = _game(rounds=2, training_steps=4)
    with torch.no_grad():
        student.logits += torch.randn(student.logits.shape, generator=torch.Generator().manual_seed(5))
    game.after_update(1)
    with torch.no_grad():
        student.logits += 1
    other, other_student, _ = _game(rounds=2, training_steps=4)
    other_student.load_state_dict(student.state_dict())
    for name, module in other.checkpointed().items():
        module.load_state_dict(game.checkpointed()[name].state_dict())
    other.load_state(game.state())
    assert torch.equal(_play(game).by_player["student"], _play(other).by_player["student"])
    assert float(_play(game).metrics["round"]) == 1


def test_more_rounds_than_steps_are_refused() -> None:
    with pytest.raises(FieldError, match=r"must be at most the stage's steps, which are 2, got 3"):
        _game(rounds=3, training_steps=2)
