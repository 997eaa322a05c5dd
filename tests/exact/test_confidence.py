"""Sampling by confidence: its schedule, its exact distribution in a small world, what stays, what is refused."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from worlds import make_process

from dmmd_codecs.integers import Integers
from dmmd_core import Condition, Denoiser, Draws, Prediction, Process, TablePrediction
from dmmd_data.enumerable import MarkovChain
from dmmd_processes.masked import Masked
from dmmd_processes.uniform import Uniform
from dmmd_samplers.confidence import Confidence
from dmmd_teachers.exact import Exact


class Watcher(Denoiser):
    """Gives every token a fixed log-probability of its own, and notes its calls."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        self.calls.append((z_t, t))
        logits = torch.arange(self.vocab_size, dtype=torch.float64).expand(*z_t.shape, -1)
        return TablePrediction(logits.log_softmax(-1))


def _sampler(process: Process, length: int, **params: object) -> Confidence:
    return Confidence(Confidence.Config(**params), process=process, length=length)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "maskgit_cosine", "polynomial"])
@pytest.mark.parametrize("steps", [1, 2, 5, 8, 30])
def test_the_masked_share_falls_as_a_cosine_and_the_network_is_shown_its_time(schedule: str, steps: int) -> None:
    process, length = make_process("masked", 4, schedule), 20
    watcher = Watcher(4)
    tokens = _sampler(process, length).sample(watcher, Draws.for_range(0, 0, 0, 6), num_steps=steps).tokens
    assert bool((tokens < 4).all())
    assert len(watcher.calls) == steps
    before = length
    for step, (z, t) in enumerate(watcher.calls):
        share = math.cos(0.5 * math.pi * step / steps)
        expected = length if step == 0 else min(before, max(1, min(before - 1, math.floor(length * share + 1e-9))))
        assert bool(((z == 4).sum(-1) == expected).all())
        assert torch.allclose(1 - process.alpha(t), torch.full((6,), share, dtype=torch.float64), atol=1e-9)
        before = expected
    for (z, _), (later, _) in itertools.pairwise(watcher.calls):
        assert bool((later[z < 4] == z[z < 4]).all()), "what is seen stays"


@pytest.mark.parametrize("noise", [0.0, 1.5])
def test_two_steps_follow_the_distribution_by_enumeration(noise: float) -> None:
    """Both positions are drawn, the surer one stays, the other is drawn again given it."""
    data = MarkovChain(MarkovChain.Config(letters=3, length=2, sharpness=1.5), codec=Integers(Integers.Config()))
    process = make_process("masked", 3)
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    joint = data.probabilities().reshape(3, 3)
    left, right = joint.sum(1), joint.sum(0)
    probs = torch.zeros(3, 3, dtype=torch.float64)
    for a, b in itertools.product(range(3), repeat=2):
        gap = float((left[a] / right[b]).log())
        # A difference of two Gumbels is logistic; half of the noise's scale is left after one of two steps.
        first = float(gap >= 0) if noise == 0 else 1 / (1 + math.exp(-gap / (noise / 2)))
        drawn = left[a] * right[b]
        probs[a] += drawn * first * joint[a] / left[a]
        probs[:, b] += drawn * (1 - first) * joint[:, b] / right[b]
    assert float(probs.sum()) == pytest.approx(1)
    count = 40_000
    sampler = _sampler(process, 2, confidence_temperature=noise)
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=2, last_step=True)
    counts = (samples.tokens @ torch.tensor([3, 1])).bincount(minlength=9)
    flat = probs.flatten()
    # Six standard deviations of a binomial count.
    assert bool(((counts - count * flat).abs() <= 6 * (count * flat * (1 - flat)).sqrt()).all())
    # The last step's probabilities: certain where a token stayed, and averaged they are the same distribution.
    assert samples.last_log_probs is not None
    last = samples.last_log_probs.exp()
    assert bool(((last.amax(-1) == 1).sum(-1) >= 1).all())
    mean = torch.einsum("na,nb->ab", last[:, 0], last[:, 1]) / count
    assert bool(((mean - probs).abs() <= 6 * (probs * (1 - probs) / count).sqrt()).all())


def test_the_surest_stay_first_and_noise_changes_which() -> None:
    process, length = make_process("masked", 4), 30
    kept = {}
    for noise in (0.0, 100.0):
        watcher = Watcher(4)
        sampler = _sampler(process, length, confidence_temperature=noise)
        sampler.sample(watcher, Draws.for_range(0, 0, 0, 200), num_steps=3)
        seen = watcher.calls[1][0]
        kept[noise] = seen[seen < 4].double().mean()
    assert float(kept[0.0]) == 3, "the likeliest token is the surest"
    # Almost random choices: the mean of tokens drawn by softmax(0, 1, 2, 3) is 2.49, with a standard deviation of 0.8.
    assert float(kept[100.0]) == pytest.approx(2.49, abs=6 * 0.8 / math.sqrt(200 * 4))


def test_fixed_positions_stay_and_are_not_counted() -> None:
    process, length = make_process("masked", 4), 10
    fixed = torch.zeros(5, length, dtype=torch.bool)
    fixed[:, :4] = True
    fixed[4] = True  # nothing to do in one of the samples
    values = torch.ones(5, length, dtype=torch.int64)
    watcher = Watcher(4)
    sampler = _sampler(process, length)
    condition = Condition(fixed=fixed, values=values)
    tokens = sampler.sample(watcher, Draws.for_range(0, 0, 0, 5), num_steps=3, condition=condition).tokens
    assert bool((tokens[fixed] == 1).all())
    counts = [(z == 4).sum(-1).tolist() for z, _ in watcher.calls]
    assert counts == [[6] * 4 + [0], [5] * 4 + [0], [3] * 4 + [0]]
    for _, t in watcher.calls:
        assert bool((t[fixed] == 0).all())
        assert len(t[~fixed].unique()) == 1
    with pytest.raises(ValueError, match="values"):
        sampler.sample(watcher, Draws.for_range(0, 0, 0, 5), num_steps=3, condition=Condition(fixed=fixed))


def test_batches_and_chunks_change_nothing() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=4, sharpness=1), codec=Integers(Integers.Config()))
    process = make_process("masked", 3)
    teacher = Exact(Exact.Config(), process=process, data=data).denoiser()
    whole = _sampler(process, 4).sample(teacher, Draws.for_range(0, 0, 0, 20), num_steps=3).tokens
    chunked = _sampler(process, 4, chunk_rows=7)
    parts = [chunked.sample(teacher, Draws.for_range(0, 0, i, 5), num_steps=3).tokens for i in (0, 5, 10, 15)]
    assert torch.equal(whole, torch.cat(parts))
    assert len(whole.unique(dim=0)) > 5


def test_only_processes_that_mask_are_taken() -> None:
    (need,) = Confidence.requires(Confidence.Config())
    assert (need.role, need.capability) == ("process", "masks")
    assert "masks" in Masked.provides(Masked.Config())
    assert "masks" not in Uniform.provides(Uniform.Config())
    guided = Confidence.Config(guidance=2.0)
    assert "guides" in Confidence.provides(guided)
    assert {need.capability for need in Confidence.requires(guided)} == {"masks", "labels", "unlabelled"}
