"""Guidance and confidence within blocks: two contexts, the exact distribution of the two together, and lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from worlds import make_process

from dmmd_codecs.integers import Integers
from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    Prediction,
    Process,
    Sampler,
    ShapedDenoiser,
    TablePrediction,
    UnsupportedError,
)
from dmmd_data.enumerable import MarkovChain
from dmmd_samplers.ancestral import Ancestral
from dmmd_samplers.block import Block
from dmmd_samplers.confidence import Confidence
from dmmd_teachers.exact import ExactDenoiser

VOCAB, LENGTH, SIZE, CLASSES = 2, 4, 2, 2


def _sequences(length: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(VOCAB)] * length).reshape(-1, length)


def _tables() -> Tensor:
    """p(sequence | label) of every class and, last, of none: their mixture; ``[classes + 1, sequences]``."""
    source = torch.Generator().manual_seed(0)
    probs = torch.rand(CLASSES, VOCAB**LENGTH, generator=source, dtype=torch.float64).square()
    probs = probs / probs.sum(-1, keepdim=True)
    return torch.cat((probs, probs.mean(0, keepdim=True)))


class World(Denoiser):
    """The exact teacher of a labelled world in blocks; its context remembers the label and serves no other."""

    def __init__(self, process: Process, sequences: Tensor, tables: Tensor, block_size: int | None = None) -> None:
        super().__init__()
        self.block_size = block_size
        self.experts = [ExactDenoiser(process, sequences, row, block_size) for row in tables]
        self.encoded: list[Tensor] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert condition is not None
        assert condition.label is not None
        tokens = None
        if condition.context is not None:
            tokens, label = condition.context
            assert torch.equal(label, condition.label), "a context of another label"
        told = Condition(context=tokens, clean=condition.clean)
        tables = torch.stack([one(z_t, t, told).log_probs().unflatten(0, z_t.shape) for one in self.experts])
        return TablePrediction(tables[condition.label, torch.arange(len(z_t))])

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        assert condition is not None
        assert condition.label is not None
        self.encoded.append(condition.label)
        if condition.context is None:
            return tokens, condition.label
        before, label = condition.context
        assert torch.equal(label, condition.label)
        return torch.cat((before, tokens), dim=1), label


class Told(Denoiser):
    """A denoiser that is always told one label, so that it can be enumerated."""

    def __init__(self, inner: Denoiser, label: int) -> None:
        super().__init__()
        self.inner, self.label = inner, label

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        return self.inner(z_t, t, Condition(label=torch.full((len(z_t),), self.label)), latent)


def _guided_distribution(process: Process, label: int, scale: float, steps: int) -> Tensor:
    """Product over blocks, each from a world of its own that has only that block's sequences, given those before."""
    plain = Ancestral(Ancestral.Config(), process=process, length=SIZE)
    tables = _tables().unflatten(1, (VOCAB**SIZE, VOCAB**SIZE))

    def factor(rows: Tensor) -> Tensor:
        world = World(process, _sequences(SIZE), rows / rows.sum(-1, keepdim=True))
        model = ShapedDenoiser(world, guidance=scale, num_classes=CLASSES)
        return plain.distribution(Told(model, label), num_steps=steps)

    second = torch.stack([factor(tables[:, first]) for first in range(VOCAB**SIZE)])
    return (factor(tables.sum(-1)).unsqueeze(1) * second).flatten()


def _assert_follows(tokens: Tensor, probs: Tensor, vocab: int = VOCAB) -> None:
    places = vocab ** torch.arange(tokens.shape[1] - 1, -1, -1)
    counts, count = (tokens @ places).bincount(minlength=len(probs)), len(tokens)
    # Six standard deviations of a binomial count.
    assert bool(((counts - count * probs).abs() <= 6 * (count * probs * (1 - probs)).sqrt() + 1e-6).all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_guided_blocks_follow_the_product_of_every_blocks_guided_distribution(name: str) -> None:
    process, scale, steps, count, label = make_process(name, VOCAB), 2.5, 2, 20_000, 1
    probs = _guided_distribution(process, label, scale, steps)
    assert float(probs.sum()) == pytest.approx(1, abs=1e-12)
    assert float((probs - _guided_distribution(process, label, 1.0, steps)).abs().sum()) > 0.1
    world = World(process, _sequences(LENGTH), _tables(), SIZE)
    condition, draws = Condition(label=torch.full((count,), label)), Draws.for_range(0, 0, 0, count)

    def sample(denoiser: Denoiser, guidance: float) -> Tensor:
        config = Ancestral.Config(guidance=guidance)
        inner = Ancestral(config, process=process, length=LENGTH, num_classes=CLASSES)
        sampler = Block(Block.Config(), inner=inner, process=process, length=LENGTH)
        return sampler.sample(denoiser, draws, num_steps=steps, condition=condition).tokens

    tokens = sample(world, scale)
    _assert_follows(tokens, probs)
    with_label, without = world.encoded
    assert bool((with_label == label).all())
    assert bool((without == CLASSES).all())
    # Decided near the model, as by `dmmd-sample --guidance`: the same, whatever the sampler would have done.
    decided = ShapedDenoiser(world, guidance=scale, num_classes=CLASSES)
    assert decided.block_size == SIZE
    for guidance in (1.0, 7.0):
        assert torch.equal(sample(decided, guidance), tokens)


def test_a_guided_denoiser_takes_no_context_but_its_own() -> None:
    process = make_process("masked", VOCAB)
    world = World(process, _sequences(LENGTH), _tables(), SIZE)
    model = ShapedDenoiser(world, guidance=2.0, num_classes=CLASSES)
    clean, z, t = torch.zeros(1, SIZE, dtype=torch.int64), torch.full((1, SIZE), VOCAB), torch.full((1,), 0.5)
    told = Condition(label=torch.zeros(1, dtype=torch.int64))
    context = model.encode(clean, told)
    model(z, t, Condition(label=told.label, context=context))
    with pytest.raises(UnsupportedError, match="encode them with the guided denoiser"):
        model(z, t, Condition(label=told.label, context=world.encode(clean, told)))
    with pytest.raises(ValueError, match="guidance needs labels"):
        model.encode(clean)


def test_all_blocks_at_once_are_guided_as_one_by_one() -> None:
    """In distillation the teacher is guided on all blocks, given the clean ones."""
    process, draws = make_process("masked", VOCAB), Draws.for_range(0, 0, 0, 50)
    world = World(process, _sequences(LENGTH), _tables(), SIZE)
    model = ShapedDenoiser(world, guidance=3.0, num_classes=CLASSES)
    clean, label = draws.integers("x", VOCAB, (LENGTH,)), draws.integers("label", CLASSES)
    t = draws.uniform("t", (LENGTH // SIZE,)).repeat_interleave(SIZE, dim=1)
    z = process.corrupt(clean, t, draws)
    together = model(z, t, Condition(label=label, clean=clean)).log_probs().unflatten(0, z.shape)
    parts, context = [], None
    for start in range(0, LENGTH, SIZE):
        part = slice(start, start + SIZE)
        told = Condition(label=label, context=context)
        parts.append(model(z[:, part], t[:, part], told).log_probs().unflatten(0, (50, SIZE)))
        context = model.encode(clean[:, part], told)
    assert torch.allclose(torch.cat(parts, dim=1).exp(), together.exp(), rtol=0, atol=1e-12)


# ---- confidence ----------------------------------------------------------------------------------------------------


def _chain(length: int, block_size: int | None) -> tuple[MarkovChain, Process, ExactDenoiser]:
    config = MarkovChain.Config(letters=3, length=length, sharpness=2.0)
    data, process = MarkovChain(config, codec=Integers(Integers.Config())), make_process("masked", 3)
    return data, process, ExactDenoiser(process, data.sequences(), data.probabilities(), block_size)


def test_confidence_in_blocks_of_one_token_is_exact_autoregression() -> None:
    data, process, teacher = _chain(3, 1)
    inner = Confidence(Confidence.Config(), process=process, length=3)
    sampler = Block(Block.Config(), inner=inner, process=process, length=3)
    draws = Draws.for_range(0, 0, 0, 20_000)
    tokens = sampler.sample(teacher, draws, num_steps=2).tokens
    _assert_follows(tokens, data.probabilities(), vocab=3)
    samples = sampler.sample(teacher, draws, num_steps=2, length=2, last_step=True)
    assert torch.equal(samples.tokens, tokens[:, :2])
    assert samples.last_log_probs is not None
    assert samples.last_log_probs.shape == (20_000, 2, 3)


@pytest.mark.parametrize("kind", [Confidence, Ancestral])
def test_a_length_asked_for_is_that_of_a_sampler_made_for_it(kind: type[Sampler]) -> None:
    _, process, teacher = _chain(4, None)
    made, asked = (kind(kind.Config(), process=process, length=length) for length in (4, 9))
    draws = Draws.for_range(0, 0, 0, 50)
    expected = made.sample(teacher, draws, num_steps=3, last_step=True)
    given = asked.sample(teacher, draws, num_steps=3, last_step=True, length=4)
    assert torch.equal(given.tokens, expected.tokens)
    assert torch.equal(given.last_log_probs, expected.last_log_probs)  # type: ignore[arg-type]


def test_guided_confidence_encodes_blocks_with_and_without_their_label() -> None:
    process, count = make_process("masked", VOCAB), 500
    world = World(process, _sequences(LENGTH), _tables(), SIZE)
    inner = Confidence(Confidence.Config(guidance=2.0), process=process, length=LENGTH, num_classes=CLASSES)
    sampler = Block(Block.Config(), inner=inner, process=process, length=LENGTH)
    condition = Condition(label=torch.zeros(count, dtype=torch.int64))
    tokens = sampler.sample(world, Draws.for_range(0, 0, 0, count), num_steps=2, condition=condition).tokens
    assert int(tokens.max()) < VOCAB
    assert [int(label[0]) for label in world.encoded] == [0, CLASSES]
