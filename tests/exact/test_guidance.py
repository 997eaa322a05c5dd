"""Guidance by labels: the formula by enumeration, what it leaves alone, what it costs, and that students absorb it."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor
from worlds import Free, make_process, naive_mean

from dmmd_core import (
    Batch,
    Condition,
    Denoiser,
    Draws,
    Prediction,
    ShapedDenoiser,
    TablePrediction,
    UnsupportedError,
    guide_log_probs,
    guided,
    shape_log_probs,
)
from dmmd_objectives.denoising import Denoising
from dmmd_objectives.moment_matching import MomentMatching
from dmmd_samplers.ancestral import Ancestral
from dmmd_teachers.exact import ExactDenoiser

VOCAB, LENGTH, CLASSES = 3, 2, 2
SCALES = [0.0, 0.5, 1.0, 1.5, 3.0]


def _class_probabilities() -> Tensor:
    """p(sequence | class), ``[classes, sequences]``; the first class lacks a sequence, the second another."""
    source = torch.Generator().manual_seed(0)
    probs = torch.rand(CLASSES, VOCAB**LENGTH, generator=source, dtype=torch.float64)
    probs[0, 0] = probs[1, 5] = 0
    return probs / probs.sum(-1, keepdim=True)


class Labelled(Denoiser):
    """The exact teacher of a labelled world; without label it knows the mixture. Notes the labels of its calls."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.process = make_process(name, VOCAB)
        sequences = torch.tensor(list(itertools.product(range(VOCAB), repeat=LENGTH)))
        probs = _class_probabilities()
        self.experts = [ExactDenoiser(self.process, sequences, row) for row in (*probs, probs.mean(0))]
        self.calls: list[Tensor | None] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        label = None if condition is None else condition.label
        self.calls.append(label)
        chosen = torch.full((len(z_t),), CLASSES) if label is None else label
        tables = torch.stack([one(z_t, t).log_probs().unflatten(0, z_t.shape) for one in self.experts])
        return TablePrediction(tables[chosen, torch.arange(len(z_t))])


class Told(Denoiser):
    """A denoiser that is always told one label, so that it can be enumerated."""

    def __init__(self, inner: Denoiser, label: int) -> None:
        super().__init__()
        self.inner, self.label = inner, label

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        return self.inner(z_t, t, Condition(label=torch.full((len(z_t),), self.label)), latent)


def _by_hand(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Powers and a sum, with 0 ** 0 = 1 for what both exclude: probabilities, not logarithms."""
    product = conditional**scale * unconditional ** (1 - scale)
    product = torch.where((conditional == 0) & torch.tensor(scale > 0), 0.0, product)
    return product / product.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["masked", "uniform"])
@pytest.mark.parametrize("scale", SCALES)
def test_a_guided_exact_teacher_is_the_formula(name: str, scale: float) -> None:
    teacher = Labelled(name)
    model = ShapedDenoiser(teacher, guidance=scale, num_classes=CLASSES)
    probs = _class_probabilities()
    for z in itertools.product(range(teacher.process.num_inputs), repeat=LENGTH):
        noisy = torch.tensor(z)
        for label, t in itertools.product(range(CLASSES), (0.3, 0.9)):
            if name == "masked" and VOCAB * z[0] + z[1] in (0, 5):
                continue  # a clean sequence that one of the classes lacks: 0 / 0 in the enumeration
            condition = Condition(label=torch.tensor([label]))
            given = model(noisy[None], torch.tensor([t], dtype=torch.float64), condition).log_probs().exp()
            expected = _by_hand(
                naive_mean(teacher.process, probs[label], LENGTH, noisy, t),
                naive_mean(teacher.process, probs.mean(0), LENGTH, noisy, t),
                scale,
            )
            assert torch.allclose(given, expected, rtol=0, atol=1e-12), (z, label, t)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_impossible_tokens_make_no_nan_and_known_ones_are_carried_over(scale: float, dtype: torch.dtype) -> None:
    inf = math.inf
    rows = torch.tensor(
        [
            [[0, -inf, -inf], [0, -inf, -inf]],  # a known position, the same to both
            [[math.log(0.5), math.log(0.5), -inf], [math.log(0.25), math.log(0.25), math.log(0.5)]],
            [[math.log(0.25), math.log(0.25), math.log(0.5)], [math.log(0.5), math.log(0.5), -inf]],
            [[-200.0, 0, -inf], [0, -200.0, -inf]],
        ],
        dtype=dtype,
    )
    conditional, unconditional = rows[:, 0].log_softmax(-1), rows[:, 1].log_softmax(-1)
    result = guide_log_probs(conditional, unconditional, scale)
    assert not bool(result.isnan().any())
    assert not bool((result == inf).any())
    assert torch.allclose(result.exp().sum(-1), torch.ones(4, dtype=dtype), atol=1e-6)
    assert torch.equal(result[0], rows[0, 0])
    if scale > 0:
        assert bool((result[conditional == -inf] == -inf).all())
    if scale > 1:  # what only the label allows takes all there is
        assert float(result[2].exp()[2]) > 0.99


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_known_and_fixed_positions_survive_guidance(name: str) -> None:
    teacher = Labelled(name)
    model = ShapedDenoiser(teacher, guidance=4.0, num_classes=CLASSES, temperature=0.5, top_p=0.9)
    z = torch.tensor([[1, teacher.process.num_inputs - 1], [2, 0]])
    t = torch.tensor([[0.0, 0.7], [0.0, 0.0]], dtype=torch.float64)
    log_probs = model(z, t, Condition(label=torch.tensor([0, 1]))).log_probs().unflatten(0, z.shape)
    for row, position in ((0, 0), (1, 0), (1, 1)):
        expected = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
        expected[z[row, position]] = 0
        assert torch.allclose(log_probs[row, position].exp(), expected.exp(), atol=1e-12)
    assert bool(log_probs[0, 1].isfinite().all())


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_guided_sampling_follows_the_exact_distribution_of_the_guided_teacher(name: str) -> None:
    teacher, scale, steps, count = Labelled(name), 2.5, 3, 20_000
    plain = Ancestral(Ancestral.Config(), process=teacher.process, length=LENGTH)
    sampler = Ancestral(Ancestral.Config(guidance=scale), process=teacher.process, length=LENGTH, num_classes=CLASSES)
    model = ShapedDenoiser(teacher, guidance=scale, num_classes=CLASSES)
    unguided = plain.distribution(Told(teacher, 1), num_steps=steps)
    probs = plain.distribution(Told(model, 1), num_steps=steps)
    assert float((probs - unguided).abs().sum()) > 0.2
    condition = Condition(label=torch.ones(count, dtype=torch.int64))
    teacher.calls.clear()
    tokens = sampler.sample(teacher, Draws.for_range(0, 0, 0, count), num_steps=steps, condition=condition).tokens
    # Two calls a step: one with the label, one without.
    assert [bool((label == CLASSES).all()) for label in teacher.calls if label is not None] == [False, True] * steps
    counts = (tokens @ torch.tensor([VOCAB, 1])).bincount(minlength=VOCAB**LENGTH)
    # Six standard deviations of a binomial count.
    assert bool(((counts - count * probs).abs() <= 6 * (count * probs * (1 - probs)).sqrt() + 1e-6).all())


def test_one_step_of_a_masked_sampler_draws_from_the_guided_mean() -> None:
    teacher = Labelled("masked")
    plain = Ancestral(Ancestral.Config(), process=teacher.process, length=LENGTH)
    model = Told(ShapedDenoiser(teacher, guidance=3.0, num_classes=CLASSES), 0)
    given = plain.distribution(model, num_steps=1)
    probs = _class_probabilities()
    joint = [p.reshape(VOCAB, VOCAB) for p in (probs[0], probs.mean(0))]
    first, second = (_by_hand(joint[0].sum(axis), joint[1].sum(axis), 3.0) for axis in (1, 0))
    assert torch.allclose(given, torch.outer(first, second).flatten(), rtol=0, atol=1e-12)


def test_guidance_comes_before_temperature_and_temperature_before_the_nucleus() -> None:
    teacher = Labelled("uniform")
    z, t = torch.tensor([[0, 1], [2, 2]]), torch.tensor([0.6, 0.9], dtype=torch.float64)
    condition = Condition(label=torch.tensor([0, 1]))
    model = ShapedDenoiser(teacher, guidance=2.0, num_classes=CLASSES, temperature=0.6, top_p=0.7, lowering=2.0)
    with_label, without = (teacher(z, t, one).log_probs() for one in (condition, None))
    expected = shape_log_probs(guide_log_probs(with_label, without, 2.0), 0.6, 0.7, 2.0)
    given = model(z, t, condition)
    assert torch.equal(given.log_probs(), expected)
    rows = torch.tensor([3, 1])
    assert torch.equal(given.log_probs(rows), expected[rows])
    other = guide_log_probs(shape_log_probs(with_label, 0.6, 0.7), shape_log_probs(without, 0.6, 0.7), 2.0)
    assert float((expected - other).abs().max()) > 1e-2


def test_what_was_decided_near_the_model_is_not_guided_again() -> None:
    teacher = Labelled("masked")
    for scale in (1.0, 3.0):
        model = ShapedDenoiser(teacher, guidance=scale, num_classes=CLASSES)
        assert guided(model, 2.0, CLASSES) is model
    assert guided(teacher, 1.0, None) is teacher


def test_a_sampler_that_guides_does_so_before_a_callers_temperature_and_nucleus() -> None:
    teacher = Labelled("masked")
    z, t = torch.tensor([[0, 3], [3, 3]]), torch.tensor([0.6, 0.9], dtype=torch.float64)
    condition = Condition(label=torch.tensor([0, 1]))
    settings = {"temperature": 0.6, "top_p": 0.7, "lowering": 2.0}
    expected = ShapedDenoiser(teacher, guidance=2.0, num_classes=CLASSES, **settings)
    given = guided(ShapedDenoiser(teacher, **settings), 2.0, CLASSES)
    assert torch.equal(given(z, t, condition).log_probs(), expected(z, t, condition).log_probs())


def test_guidance_without_labels_is_refused_and_not_ignored() -> None:
    teacher = Labelled("masked")
    model = ShapedDenoiser(teacher, guidance=2.0, num_classes=CLASSES)
    z, t = torch.tensor([[3, 3]]), torch.ones(1, dtype=torch.float64)
    for condition in (None, Condition()):
        with pytest.raises(ValueError, match="guidance needs labels"):
            model(z, t, condition)
    with pytest.raises(UnsupportedError, match="context"):
        model(z, t, Condition(label=torch.zeros(1, dtype=torch.int64), context=object()))
    with pytest.raises(ValueError, match="number of classes"):
        ShapedDenoiser(teacher, guidance=2.0)
    sampler = Ancestral(Ancestral.Config(guidance=2.0), process=teacher.process, length=LENGTH, num_classes=CLASSES)
    assert "distribution" not in Ancestral.provides(sampler.config)
    with pytest.raises(UnsupportedError, match="needs labels"):
        sampler.distribution(teacher, num_steps=1)


class FreeByLabel(Denoiser):
    """A `Free` denoiser for every label and one for "no label"; notes how it was called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        process = make_process(name, VOCAB)
        self.tables = torch.nn.ModuleList(Free(process, LENGTH, seed) for seed in range(10, 11 + CLASSES))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert condition is not None
        assert condition.label is not None
        self.calls.append((z_t, t, condition.label))
        tables = torch.stack([table(z_t, t).log_probs().unflatten(0, z_t.shape) for table in self.tables])
        return TablePrediction(tables[condition.label, torch.arange(len(z_t))])


def _game(name: str, teacher: Denoiser, **params: object) -> tuple[MomentMatching, Free, Free]:
    process = make_process(name, VOCAB)
    student, auxiliary = Free(process, LENGTH, 0), Free(process, LENGTH, 1)
    game = MomentMatching(
        MomentMatching.Config(**params),  # type: ignore[arg-type]
        process=process,
        network=student,
        teacher=teacher,
        copy_teacher=lambda: auxiliary,
        num_steps=4,
        num_classes=CLASSES,
    )
    return game, student, auxiliary


class ByHand(Denoiser):
    """What a guided `FreeByLabel` should say, from probabilities."""

    def __init__(self, inner: FreeByLabel, scale: float) -> None:
        super().__init__()
        self.inner, self.scale = inner, scale

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert condition is not None
        assert condition.label is not None
        free = dataclasses.replace(condition, label=torch.full_like(condition.label, CLASSES))
        with_label, without = (self.inner(z_t, t, one).log_probs().exp() for one in (condition, free))
        return TablePrediction(_by_hand(with_label, without, self.scale).log().unflatten(0, z_t.shape))


@pytest.mark.parametrize("name", ["masked", "uniform"])
def test_a_student_absorbs_the_guided_teacher_at_one_teacher_call_more(name: str) -> None:
    teacher, reference = FreeByLabel(name), FreeByLabel(name)
    draws = Draws.for_range(0, 0, 0, 40)
    batch = Batch(draws.integers("tokens", VOCAB, (LENGTH,)), draws.integers("labels", CLASSES))
    results = []
    for game, student, auxiliary in (
        _game(name, teacher, guidance=2.5),
        _game(name, ByHand(reference, 2.5)),
        _game(name, FreeByLabel(name)),
    ):
        losses = game.loss(("student", "auxiliary"), batch, draws).by_player
        (losses["student"] + losses["auxiliary"]).backward()
        results.append([student.logits.grad, auxiliary.logits.grad])
        assert len(student.calls) == len(auxiliary.calls) == 1
        ((_, _, condition),) = student.calls
        assert condition is not None
        assert condition.label is batch.labels, "the student is told the label and asked once"
    for given, expected, unguided in zip(*results, strict=True):
        assert torch.allclose(given, expected, rtol=1e-10, atol=1e-14)
        assert float((given - unguided).abs().max()) > 1e-3
    labels = [label.tolist() for _, _, label in teacher.calls]
    assert labels == [batch.labels.tolist(), [CLASSES] * 40]  # type: ignore[union-attr]
    assert torch.equal(teacher.calls[0][0], teacher.calls[1][0])
    assert torch.equal(teacher.calls[0][1], teacher.calls[1][1])


def test_label_dropout_drops_its_share_and_changes_nothing_else() -> None:
    process = make_process("masked", VOCAB)
    count, rate = 20_000, 0.3
    draws = Draws.for_range(0, 0, 0, count)
    batch = Batch(draws.integers("tokens", VOCAB, (LENGTH,)), draws.integers("labels", CLASSES))
    calls = []
    for dropout in (0.0, rate):
        network = Free(process, LENGTH, 0)
        objective = Denoising(
            Denoising.Config(label_dropout=dropout), process=process, network=network, teacher=None, num_classes=CLASSES
        )
        objective.loss(("network",), batch, draws)
        calls.append(network.calls[0])
    (z, t, kept), (z_too, t_too, dropped) = calls
    assert torch.equal(z, z_too)
    assert torch.equal(t, t_too)
    assert kept is not None
    assert kept.label is batch.labels
    assert dropped is not None
    assert dropped.label is not None
    gone = dropped.label == CLASSES
    assert torch.equal(dropped.label[~gone], batch.labels[~gone])  # type: ignore[index]
    # Six standard deviations of a binomial share, among all and among the late times.
    for part in (slice(None), t > 0.5):
        size = len(gone[part])
        assert abs(float(gone[part].double().mean()) - rate) < 6 * math.sqrt(rate * (1 - rate) / size)


def test_a_teacher_as_target_is_asked_with_the_labels_that_the_network_was_given() -> None:
    teacher = FreeByLabel("masked")
    process, draws = make_process("masked", VOCAB), Draws.for_range(0, 0, 0, 50)
    batch = Batch(draws.integers("tokens", VOCAB, (LENGTH,)), draws.integers("labels", CLASSES))
    network = Free(process, LENGTH, 0)
    config = Denoising.Config(label_dropout=0.5, target="teacher")
    Denoising(config, process=process, network=network, teacher=teacher, num_classes=CLASSES).loss(
        ("network",), batch, draws
    )
    condition = network.calls[0][2]
    assert condition is not None
    assert condition.label is not None
    assert 5 < int((condition.label == CLASSES).sum()) < 45
    assert torch.equal(teacher.calls[0][2], condition.label)
