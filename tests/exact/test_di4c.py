"""Di4C against enumeration: the control variate changes no gradient, and the losses are those of plain loops."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from worlds import Free, Watched, make_process

from dmmd_core import Batch, Condition, Denoiser, Draws, Prediction, Process, per_position
from dmmd_objectives.di4c import MixtureDistillation, correlation, divergence, log_mean

VOCAB, LENGTH, BATCH, LATENTS = 3, 2, 48, 3


class FreeMixture(Denoiser):
    """A row of logits for every component, position and input id; the latent is the number of the component."""

    def __init__(self, process: Process, components: int = 2) -> None:
        super().__init__()
        self.process, self.components = process, components
        source = torch.Generator().manual_seed(7)
        shape = (components, LENGTH, process.num_inputs, VOCAB)
        self.logits = nn.Parameter(torch.randn(shape, generator=source, dtype=torch.float64))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        self.gradients: set[bool] = set()

    @property
    def takes_latent(self) -> bool:
        return True

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor:
        return draws.integers("latent", self.components)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert latent is not None
        self.calls.append((z_t, t, latent))
        rows = self.logits[latent.unsqueeze(-1), torch.arange(LENGTH), z_t].flatten(0, 1)
        log_probs = self.process.clean_log_probs(rows, z_t.flatten(), per_position(t, z_t).flatten())
        return Watched(log_probs.unflatten(0, z_t.shape), self.gradients)


def _mixture(seed: int, components: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(components, LENGTH, VOCAB, generator=source, dtype=torch.float64)


def _joint(log_p: Tensor) -> Tensor:
    """Joint probabilities of a mixture of products, ``[vocab ** length]``."""
    parts = [math.prod(c[place, x] for place, x in enumerate(xs)) for c in log_p.exp() for xs in _all()]
    return torch.stack([torch.as_tensor(part) for part in parts]).view(len(log_p), -1).mean(0)


def _all() -> list[tuple[int, ...]]:
    return list(itertools.product(range(VOCAB), repeat=LENGTH))


def test_correlation_is_the_joint_less_the_marginals() -> None:
    log_p = _mixture(0, 4).log_softmax(-1)
    tokens = torch.tensor(_all())
    found = correlation(log_p, tokens, torch.zeros(LENGTH, dtype=torch.int64), 1).squeeze(-1)
    marginals = log_p.exp().mean(0)
    product = torch.stack([math.prod(marginals[place, x] for place, x in enumerate(xs)) for xs in _all()])  # type: ignore[misc]
    torch.testing.assert_close(found, _joint(log_p).log() - product.log())
    alone = correlation(log_p[:1], tokens, torch.zeros(LENGTH, dtype=torch.int64), 1)
    torch.testing.assert_close(alone, torch.zeros_like(alone), rtol=0, atol=1e-14)


def test_marginals_and_correlation_add_up_to_the_divergence_of_the_joint() -> None:
    """E_q[-correlation] + sum_l KL(q_l, p_l) = KL(q, p) but for a constant: same gradient as the loss it replaces."""
    logits = _mixture(1, 4).requires_grad_(True)
    q = _joint(_mixture(2, 3).log_softmax(-1))
    table = q.view(VOCAB, VOCAB)
    marginals = torch.stack((table.sum(1), table.sum(0)))
    log_p = logits.log_softmax(-1)
    (exact,) = torch.autograd.grad((q * (q.log() - _joint(log_p).log())).sum(), logits)
    log_p = logits.log_softmax(-1)
    tied = correlation(log_p, torch.tensor(_all()), torch.zeros(LENGTH, dtype=torch.int64), 1).squeeze(-1)
    split = divergence(marginals.log(), log_mean(log_p)).sum() - (q * tied).sum()
    (got,) = torch.autograd.grad(split, logits)
    torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-13)


def _game(name: str, **params: Any) -> tuple[MixtureDistillation, FreeMixture, Free]:
    process = make_process(name, VOCAB)
    student, teacher = FreeMixture(process), Free(process, LENGTH, 1)
    config = MixtureDistillation.Config(**{"latents": LATENTS, **params})
    return MixtureDistillation(config, process=process, network=student, teacher=teacher), student, teacher


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("schedule", ["constant", "linear", "sigmoid"])
def test_the_loss_is_that_of_plain_loops(name: str, schedule: str) -> None:
    game, student, teacher = _game(name, data_schedule=schedule, data_weight=0.7, distill_below=0.3)
    draws = Draws.for_range(0, 0, 0, BATCH)
    batch = Batch(draws.integers("tokens", VOCAB, (LENGTH,)))
    made = game.loss(("student",), batch, draws)
    made.by_player["student"].backward()
    (z_s, s, latent_s), (z_many, t, latent) = student.calls
    (z_t, _, _) = teacher.calls[0]
    assert torch.equal(z_many, torch.cat([z_t] * LATENTS))
    assert torch.equal(s, t - (t / 2).clamp(max=1 / 64))
    logits = student.logits.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(BATCH):
        places = [p for p in range(LENGTH) if name == "uniform" or int(z_t[b, p]) == VOCAB]
        if not places:
            continue
        copies = [b + n * BATCH for n in range(LATENTS)]
        log_p = torch.stack(
            [torch.stack([logits[latent[c], p, z_t[b, p]].log_softmax(-1) for p in places]) for c in copies]
        )
        with torch.no_grad():
            log_theta = torch.stack([teacher.logits[p, z_t[b, p]].log_softmax(-1) for p in places])
            below = []
            for c in copies:
                rows = []
                for p in places:
                    z = int(z_s[c, p])
                    one_hot = torch.nn.functional.one_hot(torch.tensor(z), VOCAB + 1)[:VOCAB].double().log()
                    known = name == "masked" and z != VOCAB
                    rows.append(one_hot if known else student.logits[latent_s[c], p, z].log_softmax(-1))
                below.append(torch.stack(rows))
            log_below = torch.stack(below)
        mean = log_p.exp().mean(0).log()

        def tied(x: list[int], log_p: Tensor = log_p, mean: Tensor = mean) -> Tensor:
            here = range(len(x))
            joint = torch.stack([sum(c[p, x[p]] for p in here) for c in log_p]).exp().mean().log()  # type: ignore[misc]
            return joint - sum(mean[p, x[p]] for p in here)

        def kl(first: Tensor, second: Tensor) -> Tensor:
            q = first.exp()
            return (torch.special.xlogy(q, q) - q * second).sum()

        value = kl(log_theta, mean)
        weight = {"constant": 1.0, "linear": float(t[b]), "sigmoid": 1 / (1 + math.exp(-20 * (float(t[b]) - 0.5)))}
        value = value - 0.7 * weight[schedule] * tied([int(batch.tokens[b, p]) for p in places])
        if float(t[b]) < 0.3:
            value = value + sum(kl(log_theta, c) for c in log_p) / LATENTS
        else:
            value = value + kl(log_below.exp().mean(0).log(), mean)
            for n in range(LATENTS):
                uniform = draws.within(f"answer{n}").uniform("x", (LENGTH,))[b]
                x = [int((log_below[n, i].exp().cumsum(0) < uniform[p]).sum()) for i, p in enumerate(places)]
                value = value - tied(x) / LATENTS
        total = total + value / (BATCH * LENGTH)
    total.backward()
    assert float(made.by_player["student"].detach()) == pytest.approx(float(total.detach()), rel=1e-10)
    assert student.logits.grad is not None
    torch.testing.assert_close(student.logits.grad, logits.grad, rtol=1e-9, atol=1e-12)
    assert teacher.logits.grad is None
    assert teacher.gradients == {False}


def test_times_have_their_share_near_zero() -> None:
    game, _, _ = _game("masked", distill_below=0.2, distill_share=0.3)
    s, t = game.draw_times(Draws.for_range(0, 0, 0, 20_000))
    near = (t < 0.2).double().mean()
    # Standard error sqrt(0.21 / 20000); six of them.
    assert abs(float(near) - 0.3) < 6 * (0.21 / 20_000) ** 0.5
    assert bool((s < t).all())
    assert bool((s >= t / 2).all())
    assert float((t - s).max()) == pytest.approx(1 / 64)


def test_a_student_without_latent_is_refused() -> None:
    process = make_process("masked", VOCAB)
    with pytest.raises(ValueError, match="needs a generator with input noise"):
        MixtureDistillation(
            MixtureDistillation.Config(), process=process, network=Free(process, 2, 0), teacher=Free(process, 2, 1)
        )
