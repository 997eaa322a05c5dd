"""Everything that the base class derives from the prior, compared with Bayes' rule in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from dmmd_hybrid.hybrid import Hybrid
from torch import Tensor

from dmmd_core import Denoiser, Draws, Sampler, Schedule, load_plugins

VOCAB = 3
MASK = VOCAB
PAIRS = [(0.0, 0.4), (0.2, 0.7), (0.5, 0.5), (0.3, 1.0), (0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]


class Line(Schedule):
    """``alpha = 1 - t``."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def alpha_prime(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


def make(mask_share: float = 0.3) -> Hybrid:
    return Hybrid(Hybrid.Config(mask_share=mask_share), vocab_size=VOCAB, schedule=Line())


def level(process: Hybrid, t: float) -> Tensor:
    """Signal level at one time."""
    return process.alpha(torch.tensor(t, dtype=torch.float64))


def noisy(process: Hybrid, alpha: Tensor) -> Tensor:
    """q(z | x) for all x and z, ``[vocab, num_inputs]``."""
    clean = torch.eye(VOCAB, process.num_inputs, dtype=torch.float64)
    return alpha * clean + (1 - alpha) * process.prior()


def bayes(process: Hybrid, s: float, t: float) -> Tensor:
    """q(z_s | z_t, x) by multiplying and normalising, ``[vocab, z_t, z_s]``; nan where z_t cannot be."""
    alpha_s, alpha_t = (process.alpha(torch.tensor(time, dtype=torch.float64)) for time in (s, t))
    ratio = torch.ones_like(alpha_t) if s == t else alpha_t / alpha_s
    size = process.num_inputs
    step = ratio * torch.eye(size, dtype=torch.float64) + (1 - ratio) * process.prior()
    joint = noisy(process, alpha_s).unsqueeze(1) * step.T  # [vocab, z_t, z_s]
    return joint / joint.sum(-1, keepdim=True)


def all_pairs(process: Hybrid) -> tuple[Tensor, Tensor]:
    """Every clean token with every noisy one: one-hot ``[vocab * inputs, 1, vocab]`` and z_t ``[.., 1]``."""
    x, z = torch.meshgrid(torch.arange(VOCAB), torch.arange(process.num_inputs), indexing="ij")
    return x.reshape(-1, 1), z.reshape(-1, 1)


def exact_world(process: Hybrid, length: int) -> tuple[Denoiser, Sampler, Tensor]:
    """A Markov chain with its exact teacher, a sampler, and the true probabilities."""
    registry = load_plugins()

    def component(kind: str, name: str, config: dict[str, int], **arguments: Any) -> Any:
        cls: Any = registry.get(kind, name).cls
        return cls(cls.Config(**config), **arguments)

    codec = component("codec", "integers", {})
    data = component("data", "markov_chain", {"letters": VOCAB, "length": length}, codec=codec)
    teacher = component("teacher", "exact", {}, process=process, data=data)
    sampler = component("sampler", "ancestral", {}, process=process, length=length)
    return teacher.denoiser(), sampler, data.probabilities()


@pytest.mark.parametrize("mask_share", [0.01, 0.3, 0.99])
def test_prior_mixes_mask_and_uniform(mask_share: float) -> None:
    process = make(mask_share)
    prior = process.prior()
    assert process.num_inputs == VOCAB + 1
    assert prior.dtype == torch.float64
    assert float(prior[MASK]) == mask_share
    assert prior[:VOCAB].tolist() == [(1 - mask_share) / VOCAB] * VOCAB
    assert float(prior.sum()) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_posterior_matches_bayes_rule(s: float, t: float) -> None:
    process = make()
    x, z_t = all_pairs(process)
    x_probs = torch.nn.functional.one_hot(x, VOCAB).double()
    times = torch.full((2, len(x)), s, dtype=torch.float64)
    times[1] = t
    got = process.posterior_probs(x_probs, z_t, times[0], times[1]).squeeze(1)
    wanted = bayes(process, s, t).flatten(0, 1)
    possible = noisy(process, process.alpha(torch.tensor(t, dtype=torch.float64))).flatten() > 0
    assert possible.sum() == (VOCAB if t == 0 else VOCAB * (VOCAB + 1))
    torch.testing.assert_close(got[possible], wanted[possible], rtol=0, atol=1e-14)


def test_posterior_of_a_mean_is_the_mixture_of_posteriors() -> None:
    process = make()
    s, t = 0.2, 0.7
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(process.num_inputs, 1, VOCAB, generator=generator, dtype=torch.float64)
    mean = mean / mean.sum(-1, keepdim=True)
    z_t = torch.arange(process.num_inputs).unsqueeze(-1)
    times = [torch.full((len(z_t),), time, dtype=torch.float64) for time in (s, t)]
    got = process.posterior_probs(mean, z_t, *times).squeeze(1)
    wanted = torch.einsum("zx, xzy -> zy", mean.squeeze(1), bayes(process, s, t))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_drawn_tokens_follow_the_posterior(s: float, t: float) -> None:
    """Hoeffding: a frequency of 20,000 draws is off by 0.02 with probability below 3e-7 each."""
    process, count = make(), 20_000
    wanted = bayes(process, s, t)
    draws = Draws.for_range(0, 0, 0, count)
    times = [torch.full((count,), time, dtype=torch.float64) for time in (s, t)]
    for x in range(VOCAB):
        for z_t in range(process.num_inputs):
            if wanted[x, z_t].isnan().any():
                continue
            full = [torch.full((count, 1), token) for token in (x, z_t)]
            z_s = process.posterior_sample(*full, *times, draws)
            frequency = z_s.flatten().bincount(minlength=process.num_inputs) / count
            assert float((frequency - wanted[x, z_t]).abs().max()) < 0.02


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_corrupted_tokens_follow_the_forward_process(t: float) -> None:
    """Hoeffding, as above."""
    process, count = make(), 20_000
    wanted = noisy(process, process.alpha(torch.tensor(t, dtype=torch.float64)))
    for x in range(VOCAB):
        tokens = torch.full((count, 1), x)
        z_t = process.corrupt(tokens, torch.full((count,), t), Draws.for_range(0, 0, 0, count))
        frequency = z_t.flatten().bincount(minlength=process.num_inputs) / count
        assert float((frequency - wanted[x]).abs().max()) < 0.02


def test_every_position_carries_a_loss_but_those_without_noise() -> None:
    process = make()
    z_s = torch.tensor([[0, 1, MASK], [0, 1, 2]])
    assert process.rows_with_loss(z_s, torch.tensor([0.5, 0.5])).all()
    assert not process.rows_with_loss(z_s, torch.tensor([0.0, 0.0])).any()
    mixed = process.rows_with_loss(z_s[1:], torch.tensor([[0.0, 0.5, 1.0]]))
    assert mixed.tolist() == [[False, True, True]]


def test_rows_not_to_be_drawn_ignore_the_clean_token() -> None:
    process, count = make(), 200
    draws = Draws.for_range(3, 0, 0, count)
    z_t = torch.arange(process.num_inputs).expand(count, -1)
    s, t = torch.full((count,), 0.4), torch.full((count,), 0.6)
    drawn = process.rows_to_draw(z_t, s, t, draws)
    results = torch.stack([process.posterior_sample(torch.full_like(z_t, x), z_t, s, t, draws) for x in range(VOCAB)])
    assert (~drawn).any()
    assert (results == results[0])[:, ~drawn].all()


def test_news_of_z_s_updates_the_clean_distribution_by_bayes_rule() -> None:
    process, s, t = make(), 0.3, 0.8
    size = process.num_inputs
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    joint = prior.view(-1, 1, 1) * bayes(process, s, t)  # [x, z_t, z_s]
    wanted = (joint / joint.sum(0)).permute(1, 2, 0).flatten(0, 1)
    z_t, z_s = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(size)] * 2, indexing="ij"))
    times = [torch.full(z_t.shape, time, dtype=torch.float64) for time in (s, t)]
    got = process.clean_posterior(prior.log().expand(len(z_t), -1), z_t, z_s, *times).exp()
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)


def test_evidence_turns_a_leave_one_out_distribution_into_the_mean() -> None:
    process, t = make(), 0.6
    process.parametrization = "leave_one_out"
    left_out = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    z = torch.arange(process.num_inputs)
    times = torch.full(z.shape, t, dtype=torch.float64)
    joint = left_out.unsqueeze(-1) * noisy(process, process.alpha(torch.tensor(t, dtype=torch.float64)))
    got = process.clean_log_probs(left_out.log().expand(len(z), -1), z, times).exp()
    torch.testing.assert_close(got, (joint / joint.sum(0)).T, rtol=0, atol=1e-14)


def test_exact_teacher_samples_a_single_position_exactly() -> None:
    """With one position the factorised prediction loses nothing, so any number of steps gives the truth."""
    teacher, sampler, truth = exact_world(make(), length=1)
    for num_steps in (1, 3, 8):
        got = sampler.distribution(teacher, num_steps=num_steps)
        torch.testing.assert_close(got, truth, rtol=0, atol=1e-12)


def test_exact_teacher_comes_nearer_with_more_steps() -> None:
    teacher, sampler, truth = exact_world(make(0.5), length=3)
    distances = []
    for num_steps in (1, 4, 16, 64):
        got = sampler.distribution(teacher, num_steps=num_steps)
        distances.append(float((got - truth).abs().sum()) / 2)
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < distances[0] / 10, distances


def test_the_share_is_bounded_in_a_recipe() -> None:
    share = next(field for field in dataclasses.fields(Hybrid.Config) if field.name == "mask_share")
    assert share.metadata["bounds"] == {"minimum": None, "above": 0, "maximum": None, "below": 1}
