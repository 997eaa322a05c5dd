"""Block-autoregressive diffusion by enumeration: the exact teacher of a block, its sampler, and times per block."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from worlds import Free, make_process, naive_mean

from dmmd_codecs.integers import Integers
from dmmd_core import (
    Batch,
    Condition,
    Denoiser,
    Draws,
    EnumerableData,
    FieldError,
    Prediction,
    Process,
    ShapedDenoiser,
    UnsupportedError,
)
from dmmd_data.enumerable import MarkovChain, TiedCoins
from dmmd_objectives.denoising import Denoising
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_samplers.ancestral import Ancestral
from dmmd_samplers.block import Block
from dmmd_teachers.exact import ExactDenoiser

CODEC = Integers(Integers.Config())
COINS = TiedCoins(TiedCoins.Config(coins=4), codec=CODEC)


def _chain(letters: int = 3, length: int = 4, sharpness: float = 2.0) -> EnumerableData:
    return MarkovChain(MarkovChain.Config(letters=letters, length=length, sharpness=sharpness), codec=CODEC)


def _setup(name: str, data: EnumerableData, block_size: int) -> tuple[Block, ExactDenoiser]:
    process = make_process(name, data.spec.vocab_size)
    inner = Ancestral(Ancestral.Config(), process=process, length=data.spec.length)
    sampler = Block(Block.Config(), inner=inner, process=process, length=data.spec.length)
    return sampler, ExactDenoiser(process, data.sequences(), data.probabilities(), block_size)


def _distance(given: Tensor, data: EnumerableData) -> float:
    return float((given - data.probabilities()).abs().sum() / 2)


def _conditional(data: EnumerableData, before: Tensor, size: int) -> Tensor:
    """p(x^i | x^{<i}) of the block after `before`, float64 ``[vocab ** size]``."""
    vocab = data.spec.vocab_size
    table = data.probabilities().reshape([vocab] * data.spec.length)
    for token in before.tolist():
        table = table[token]
    table = table.reshape(vocab**size, -1).sum(-1)
    return table / table.sum()


# ---- the sampler's distribution ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("steps", [1, 3])
def test_blocks_of_one_token_are_exact_autoregression_whatever_the_steps(name: str, steps: int) -> None:
    sampler, teacher = _setup(name, _chain(), 1)
    assert _distance(sampler.distribution(teacher, num_steps=steps), _chain()) < 1e-12


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_one_block_is_the_sampler_of_whole_sequences(name: str) -> None:
    sampler, teacher = _setup(name, _chain(), 4)
    whole = sampler.inner.distribution(ExactDenoiser(teacher.process, *_facts(_chain())), num_steps=3)
    assert torch.allclose(sampler.distribution(teacher, num_steps=3), whole, rtol=0, atol=1e-14)


def _facts(data: EnumerableData) -> tuple[Tensor, Tensor]:
    return data.sequences(), data.probabilities()


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_the_distribution_is_the_product_of_every_blocks_own(name: str) -> None:
    """Each factor from a world of its own, whose only sequences are that block's, given the tokens before it."""
    data = _chain()
    sampler, teacher = _setup(name, data, 2)
    given = sampler.distribution(teacher, num_steps=2)
    blocks = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    inner = Ancestral(Ancestral.Config(), process=sampler.process, length=2)

    def factor(before: Tensor) -> Tensor:
        world = ExactDenoiser(sampler.process, blocks, _conditional(data, before, 2))
        return inner.distribution(world, num_steps=2)

    expected = factor(blocks[0, :0]).unsqueeze(1) * torch.stack([factor(block) for block in blocks])
    assert torch.allclose(given, expected.flatten(), rtol=0, atol=1e-14)
    assert float(given.sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_tied_coins_in_blocks_lose_what_their_first_block_loses(steps: int) -> None:
    """Coins behind the first block are certain, so TV = 1 / (2k) as for two coins."""
    sampler, teacher = _setup("masked", COINS, 2)
    assert _distance(sampler.distribution(teacher, num_steps=steps), COINS) == pytest.approx(1 / (2 * steps), abs=1e-12)


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_shorter_blocks_are_nearer_to_the_truth_at_equal_steps(name: str) -> None:
    distances = []
    for size in (1, 2, 4):
        sampler, teacher = _setup(name, _chain(), size)
        distances.append(_distance(sampler.distribution(teacher, num_steps=2), _chain()))
    assert distances[0] < 1e-12 < 0.1 < distances[1] < distances[2]


# ---- the exact teacher of a block ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "uniform", "skewed"])
def test_the_exact_mean_of_a_block_sums_over_what_follows_its_prefix(name: str) -> None:
    data, process = _chain(), make_process(name)
    _, teacher = _setup("masked", data, 2)
    teacher.process = process
    before, t = torch.tensor([[2, 0]]), 0.6
    z = torch.cartesian_prod(*[torch.arange(process.num_inputs)] * 2)
    context = teacher.encode(before)
    times = torch.full((len(z),), t, dtype=torch.float64)
    got = teacher(z, times, Condition(context=context)).log_probs().exp().unflatten(0, z.shape)
    for row, mean in zip(z, got, strict=True):
        expected = naive_mean(process, _conditional(data, before[0], 2), 2, row, t)
        assert torch.allclose(mean, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_all_blocks_at_once_are_each_block_after_its_clean_prefix(name: str) -> None:
    data = _chain()
    sampler, teacher = _setup(name, data, 2)
    draws = Draws.for_range(0, 0, 0, 40)
    clean = draws.integers("x", 3, (4,))
    t = draws.uniform("t", (2,)).repeat_interleave(2, dim=1)
    z = sampler.process.corrupt(clean, t, draws)
    together = teacher(z, t, Condition(clean=clean)).log_probs().exp().unflatten(0, z.shape)
    first = teacher(z[:, :2], t[:, :2]).log_probs().exp().unflatten(0, (40, 2))
    context = teacher.encode(clean[:, :2])
    second = teacher(z[:, 2:], t[:, 2:], Condition(context=context)).log_probs().exp().unflatten(0, (40, 2))
    assert torch.equal(together, torch.cat((first, second), dim=1))


# ---- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_samples_and_last_log_probs_follow_the_exact_distribution(name: str) -> None:
    data = _chain(letters=2)
    sampler, teacher = _setup(name, data, 2)
    probs = sampler.distribution(teacher, num_steps=2)
    count = 40_000
    samples = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=2, last_step=True)
    bound = 6 * (count * probs * (1 - probs)).sqrt() + 1e-6  # six standard deviations of a binomial count
    counts = (samples.tokens @ torch.tensor([8, 4, 2, 1])).bincount(minlength=16)
    assert bool(((counts - count * probs).abs() <= bound).all())
    assert samples.last_log_probs is not None
    last = samples.last_log_probs.exp()
    joint = torch.einsum("na,nb,nc,nd->abcd", *last.unbind(1)).flatten()
    assert bool(((joint - count * probs).abs() <= bound).all())
    assert bool((last[:, :2].amax(-1) == 1).all()), "finished blocks are certain in the last step"
    assert not bool((last[:, 2:].amax(-1) == 1).all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_batch_split_gives_the_same_samples_and_blocks_have_noise_of_their_own(name: str) -> None:
    sampler, teacher = _setup(name, _chain(sharpness=0.0), 2)
    whole = sampler.sample(teacher, Draws.for_range(0, 0, 0, 40), num_steps=3).tokens
    parts = [sampler.sample(teacher, Draws.for_range(0, 0, i, 10), num_steps=3).tokens for i in (0, 10, 20, 30)]
    assert torch.equal(whole, torch.cat(parts))
    # A chain without preferences: two blocks of equal noise would be equal.
    assert not torch.equal(whole[:, :2], whole[:, 2:])


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_given_tokens_condition_what_comes_after_them_and_in_their_block_alone(name: str) -> None:
    sampler, teacher = _setup(name, COINS, 2)
    draws, count = Draws.for_range(0, 0, 0, 400), 400

    def sample(*given: int) -> Tensor:
        template = torch.tensor(given).expand(count, -1)
        condition = Condition(fixed=template >= 0, values=template.clamp_min(0))
        tokens = sampler.sample(teacher, draws, num_steps=2, condition=condition).tokens
        assert torch.equal(tokens[template >= 0], template[template >= 0])
        return tokens

    assert bool((sample(-1, 1, -1, -1) == 1).all()), "one coin known, those of its block and behind it are certain"
    assert bool((sample(1, 1, -1, 1) == 1).all())
    first = sample(-1, -1, 1, 1)[:, 0].double().mean()
    assert 0.3 < float(first) < 0.7, "a suffix tells nothing to the block before it"


class _Watched(Denoiser):
    """Counts the calls of another denoiser."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.block_size = inner.block_size
        self.calls: list[str] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        self.calls.append("predict")
        return self.inner(z_t, t, condition, latent)

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        self.calls.append("encode")
        return self.inner.encode(tokens, condition)


def test_every_finished_block_is_encoded_once_and_a_given_one_costs_no_steps() -> None:
    sampler, teacher = _setup("masked", _chain(length=6), 2)
    watched = _Watched(teacher)
    sampler.sample(watched, Draws.for_range(0, 0, 0, 3), num_steps=2)
    assert watched.calls == ["predict", "predict", "encode"] * 2 + ["predict"] * 2
    watched.calls.clear()
    template = torch.tensor([[-1, -1, 1, 2, -1, -1], [-1, 0, 0, 0, -1, -1]])
    condition = Condition(fixed=template >= 0, values=template.clamp_min(0))
    sampler.sample(watched, Draws.for_range(0, 0, 0, 2), num_steps=2, condition=condition)
    assert watched.calls == ["predict", "predict", "encode", "encode", "predict", "predict"]
    watched.calls.clear()
    everything = Condition(fixed=torch.ones(2, 6, dtype=torch.bool), values=template.clamp_min(0))
    samples = sampler.sample(watched, Draws.for_range(0, 0, 0, 2), num_steps=2, condition=everything, last_step=True)
    assert watched.calls == ["encode", "encode"]
    assert torch.equal(samples.tokens, template.clamp_min(0))
    assert samples.last_log_probs is not None
    assert torch.equal(samples.last_log_probs.argmax(-1), samples.tokens)


def test_a_length_within_a_block_cuts_it_off() -> None:
    sampler, teacher = _setup("masked", _chain(), 2)
    draws = Draws.for_range(0, 0, 0, 20)
    whole = sampler.sample(teacher, draws, num_steps=2, last_step=True)
    short = sampler.sample(teacher, draws, num_steps=2, length=3, last_step=True)
    assert torch.equal(short.tokens, whole.tokens[:, :3])
    assert whole.last_log_probs is not None
    assert short.last_log_probs is not None
    assert torch.equal(short.last_log_probs, whole.last_log_probs[:, :3])
    given = Condition(fixed=torch.tensor([[False, False, True]]).expand(20, -1), values=torch.full((20, 3), 2))
    assert bool((sampler.sample(teacher, draws, num_steps=2, length=3, condition=given).tokens[:, 2] == 2).all())


def test_shaped_teachers_keep_their_blocks() -> None:
    sampler, teacher = _setup("masked", _chain(), 2)
    shaped = ShapedDenoiser(teacher, temperature=1e-3)
    given = sampler.distribution(shaped, num_steps=2)
    assert shaped.block_size == 2
    assert float(given.sum()) == pytest.approx(1, abs=1e-12)
    assert float(given.max()) > float(sampler.distribution(teacher, num_steps=2).max())


def test_what_has_no_blocks_is_refused() -> None:
    sampler, teacher = _setup("masked", _chain(), 2)
    whole = ExactDenoiser(teacher.process, *_facts(_chain()))
    with pytest.raises(UnsupportedError, match="ExactDenoiser has no blocks"):
        sampler.sample(whole, Draws.for_range(0, 0, 0, 2), num_steps=1)
    with pytest.raises(UnsupportedError, match="encodes no blocks"):
        whole.encode(torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="whole blocks of 2 tokens"):
        sampler.distribution(teacher, num_steps=1, length=3)
    with pytest.raises(FieldError, match="another sampler of blocks"):
        Block(Block.Config(), inner=sampler, process=sampler.process, length=4)


# ---- training on all blocks at once --------------------------------------------------------------------------------

VOCAB, LENGTH, SIZE, BATCH = 4, 6, 2, 64


def _free(process: Process, seed: int) -> Free:
    network = Free(process, LENGTH, seed)
    network.block_size = SIZE
    return network


def _inputs(count: int = BATCH) -> tuple[Batch, Draws]:
    draws = Draws.for_range(0, 0, 0, count)
    return Batch(draws.integers("tokens", VOCAB, (LENGTH,))), draws


def _blocks(times: Tensor) -> Tensor:
    """Times per block, of times per position; checks that a block has one."""
    parts = times.unflatten(1, (LENGTH // SIZE, SIZE))
    assert bool((parts == parts[..., :1]).all())
    return parts[..., 0]


@pytest.mark.parametrize("params", [{}, {"weight": "elbo"}], ids=["flat", "elbo"])
def test_every_block_is_trained_at_a_time_of_its_own(params: dict[str, object]) -> None:
    process = make_process("masked", VOCAB, **params)
    network = _free(process, 0)
    batch, draws = _inputs()
    losses = Denoising(Denoising.Config(), process=process, network=network, teacher=None).loss(
        ("network",), batch, draws
    )
    ((z_t, t, condition),) = network.calls
    assert condition is not None
    assert condition.clean is batch.tokens
    times = _blocks(t)
    assert float(times.std(1).min()) > 0
    total = 0.0
    for b in range(BATCH):
        for position in range(LENGTH):
            if int(z_t[b, position]) == VOCAB:
                weight = 1 / float(times[b, position // SIZE]) if params else 1.0
                log_probs = network.logits[position, VOCAB].detach().log_softmax(-1)
                total -= weight * float(log_probs[batch.tokens[b, position]])
    # The rows' weights are float32 numbers: 2^-24 each.
    assert float(losses.by_player["network"].detach()) == pytest.approx(total / (BATCH * LENGTH), rel=2**-23)


@pytest.mark.parametrize("times", ["interval", "grid"])
def test_a_student_practises_every_block_at_its_own_times(times: str) -> None:
    process = make_process("uniform", VOCAB)
    student, teacher, auxiliary = (_free(process, seed) for seed in range(3))
    config = MomentMatching.Config(times=times, auxiliary_target="posterior")  # type: ignore[arg-type]
    game = MomentMatching(
        config, process=process, network=student, teacher=teacher, copy_teacher=lambda: auxiliary, num_steps=4
    )
    batch, draws = _inputs(4000)
    losses = game.loss(("student", "auxiliary"), batch, draws).by_player
    assert all(bool(loss.isfinite()) for loss in losses.values())
    ((z_t, t, told),) = student.calls
    for network in (teacher, auxiliary):
        ((_, s, condition),) = network.calls
        assert condition is told
    assert told is not None
    assert told.clean is batch.tokens, "every network makes a context of its own from the clean tokens"
    s, t = _blocks(s), _blocks(t)
    assert bool((s < t).all())
    assert float((t - s).max()) <= 0.25
    # Blocks are independent: correlations of 4,000 pairs, six standard errors.
    assert float((s.T.corrcoef() - torch.eye(3)).abs().max()) < 6 / 4000**0.5
    assert abs(float(s.mean()) - 0.5) < 6 * math.sqrt(1 / 12 / 12_000)
    kept = (z_t == batch.tokens).unflatten(1, (3, SIZE)).double().mean(-1)
    expected = (1 - t) + t / VOCAB  # linear schedule
    assert abs(float((kept - expected).mean())) < 6 * 0.5 / math.sqrt(24_000)
    if times == "grid":
        assert torch.equal((4 * t).round() / 4, t)
