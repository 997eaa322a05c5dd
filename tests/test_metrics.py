"""Metrics and codecs: closed forms, known cases, real digits."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmmd_codecs.integers import Integers
from dmmd_codecs.kmeans_patches import KMeansPatches
from dmmd_codecs.pixels import Pixels
from dmmd_core import Condition, Denoiser, Draws, FieldError, Metric, Prediction, Subject, Value
from dmmd_data.digits import Digits
from dmmd_data.enumerable import MarkovChain
from dmmd_metrics.class_accuracy import ClassAccuracy
from dmmd_metrics.class_histogram import ClassHistogram
from dmmd_metrics.classifier import SmallClassifier
from dmmd_metrics.copies import Copies
from dmmd_metrics.entropy import TokenEntropy
from dmmd_metrics.frechet import FrechetDistance, frechet_distance
from dmmd_metrics.total_variation import TotalVariation
from dmmd_metrics.within_class import WithinClassDiversity, mean_pairwise_distance
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear
from dmmd_samplers.ancestral import Ancestral
from dmmd_teachers.exact import ExactDenoiser


def _process(vocab_size: int) -> Masked:
    return Masked(Masked.Config(), vocab_size=vocab_size, schedule=Linear(Linear.Config()))


def _subject(tokens: Tensor, model: str = "student") -> Subject:
    return Subject(model, 4, tokens, None, None, None, _process(4), Draws.for_range(0, 0, 0, 1))


def _one(metric: Metric, name: str, subject: Subject) -> Value:
    return next(value for value in metric.evaluate(subject) if value.metric == name)


def test_frechet_distance_of_gaussians_with_commuting_covariances() -> None:
    source = torch.Generator().manual_seed(0)
    raw = torch.randn(500, 4, generator=source, dtype=torch.float64)
    white = (raw - raw.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(raw.T.cov())).T
    first = white * torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64)
    second = white * torch.tensor([2.0, 2.0, 1.0, 0.0], dtype=torch.float64) + 3
    # |m|^2 + sum (s1 - s2)^2 = 4 * 9 + 1 + 0 + 4 + 0
    assert frechet_distance(first, second) == pytest.approx(41, abs=1e-8)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-8)


def test_token_entropy_and_distinct_samples() -> None:
    metric = TokenEntropy(TokenEntropy.Config(), vocab_size=4)
    subject = _subject(torch.tensor([[0, 1], [0, 1], [2, 3], [0, 0]]))
    shares = torch.tensor([4, 2, 1, 1], dtype=torch.float64) / 8
    assert _one(metric, "pooled_token_entropy", subject).value == pytest.approx(float(-(shares * shares.log()).sum()))
    assert _one(metric, "token_entropy", subject).value == pytest.approx(0.75 * math.log(2))  # of 2, 2, 2 and 1 tokens
    assert _one(metric, "distinct_samples", subject).value == 0.75


class Mixed(Denoiser):
    """An exact teacher that says it takes a latent, so that its distribution must be estimated by averaging."""

    def __init__(self, inner: ExactDenoiser) -> None:
        super().__init__()
        self.inner = inner

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        return self.inner(z_t, t)

    @property
    def takes_latent(self) -> bool:
        return True


def test_total_variation_by_averaging_agrees_with_the_exact_one() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=3), codec=Integers(Integers.Config()))
    process = _process(3)
    sampler = Ancestral(Ancestral.Config(), process=process, length=3)
    exact = ExactDenoiser(process, data.sequences(), data.probabilities())
    metric = TotalVariation(TotalVariation.Config(num_samples=20_000, batch_size=500), data=data)
    values = {}
    for name, denoiser in (("exact", exact), ("averaged", Mixed(exact))):
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        subject = Subject(name, 2, tokens, None, denoiser, sampler, process, Draws.for_range(0, 0, 0, 1))
        (values[name],) = metric.evaluate(subject)
    assert values["exact"].standard_error is None
    assert values["exact"].num_samples == 0
    assert values["averaged"].num_samples == 20_000
    error = values["averaged"].standard_error
    assert error is not None
    assert 0 < error < 0.01
    assert values["averaged"].value == pytest.approx(values["exact"].value, abs=6 * error)
    assert metric.evaluate(_subject(torch.zeros(2, 3, dtype=torch.int64))) == []


def test_every_sample_counts_alike_whatever_the_size_of_the_last_batch() -> None:
    data = MarkovChain(MarkovChain.Config(letters=3, length=3), codec=Integers(Integers.Config()))
    process = _process(3)
    sampler = Ancestral(Ancestral.Config(), process=process, length=3)
    exact = ExactDenoiser(process, data.sequences(), data.probabilities())
    values = []
    for batch_size in (1000, 20_001):
        metric = TotalVariation(TotalVariation.Config(num_samples=20_001, batch_size=batch_size), data=data)
        tokens = torch.zeros(2, 3, dtype=torch.int64)
        subject = Subject("student", 2, tokens, None, Mixed(exact), sampler, process, Draws.for_range(0, 0, 0, 1))
        values.append(metric.evaluate(subject)[0])
    # The same samples, grouped differently: only the order of summation differs.
    assert values[0].value == pytest.approx(values[1].value, abs=1e-12)
    assert all(value.standard_error is not None and value.standard_error > 1e-5 for value in values)
    lone = TotalVariation(TotalVariation.Config(num_samples=101, batch_size=100), data=data).evaluate(subject)[0]
    assert lone.value < 0.5, "one sample in a batch of its own must not count for a group"


def test_pixels_round_trip_every_level() -> None:
    codec = Pixels(Pixels.Config(levels=17, height=4, width=5, channels=2))
    assert codec.grid == (4, 5, 2)
    tokens = torch.randint(0, 17, (3, 40))
    images = codec.decode(tokens)
    assert images.shape == (3, 2, 4, 5)
    assert images.dtype == torch.uint8
    assert torch.equal(codec.encode(images), tokens)
    assert int(codec.decode(torch.full((1, 40), 16)).min()) == 255
    assert codec.fingerprint() != Pixels(Pixels.Config(levels=16, height=4, width=5, channels=2)).fingerprint()


def test_kmeans_codec_is_deterministic_and_survives_saving(digits: Digits) -> None:
    images = digits.originals("train")
    assert images is not None
    fitted = [KMeansPatches(KMeansPatches.Config(codes=16)) for _ in range(2)]
    for codec in fitted:
        with pytest.raises(RuntimeError, match="no codebook yet"):
            codec.fingerprint()
        codec.fit(images)
    assert fitted[0].fingerprint() == fitted[1].fingerprint()
    restored = KMeansPatches(KMeansPatches.Config(codes=16))
    restored.load_state(fitted[0].state())
    tokens = fitted[0].encode(images[:50])
    assert torch.equal(restored.encode(images[:50]), tokens)
    # Decoded patches are code vectors, so that encoding them again gives the same pictures.
    decoded = restored.decode(tokens)
    assert torch.equal(restored.decode(restored.encode(decoded)), decoded)
    error = (decoded.double() - images[:50].double()).square().mean()
    assert float(error) < float(images.double().var()) / 5


@pytest.fixture(scope="module")
def digits() -> Digits:
    data = Digits(Digits.Config(), codec=KMeansPatches(KMeansPatches.Config()))
    data.prepare()
    return data


def test_digits_are_split_by_class_without_overlap(digits: Digits) -> None:
    train, test = digits.split("train"), digits.split("test")
    assert len(train) + len(test) == 1797
    assert len(test) == 450
    assert train.labels is not None
    assert test.labels is not None
    shares = [batch.bincount(minlength=10) / len(batch) for batch in (train.labels, test.labels)]
    assert float((shares[0] - shares[1]).abs().max()) < 0.01
    epoch = digits.training_batch(Draws.for_range(0, 0, 0, len(train)))
    assert torch.equal(epoch.tokens.unique(dim=0), train.tokens.unique(dim=0)), "an epoch shows every example once"
    with pytest.raises(KeyError, match="no split 'valid'"):
        digits.split("valid")


def test_digits_refuse_codecs_of_another_size() -> None:
    with pytest.raises(FieldError, match="must take images of shape"):
        Digits(Digits.Config(), codec=Pixels(Pixels.Config(height=9)))


def test_feature_metrics_rank_real_images_before_noise(digits: Digits, tmp_path: Path) -> None:
    def classifier() -> SmallClassifier:
        return SmallClassifier(SmallClassifier.Config(), data=digits, num_classes=10, cache_directory=tmp_path)

    before = torch.get_rng_state()
    frechet = FrechetDistance(FrechetDistance.Config(), features=classifier(), data=digits, codec=digits.codec)
    facts = frechet.prepare()
    assert facts["classifier_test_accuracy"] > 0.97
    assert torch.equal(before, torch.get_rng_state())
    histogram = ClassHistogram(
        ClassHistogram.Config(), features=classifier(), data=digits, codec=digits.codec, num_classes=10
    )
    kept = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert histogram.prepare() == facts, "the second metric must find the same classifier in the cache"
    assert kept == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    real, labels = digits.split("test").tokens, digits.split("test").labels
    assert labels is not None
    noise = torch.randint(0, 64, real.shape, generator=torch.Generator().manual_seed(0))
    one_class = real[labels == 3]
    distance = [_one(frechet, "frechet_distance", _subject(tokens)).value for tokens in (real, one_class, noise)]
    assert distance[0] < distance[1] / 10
    assert distance[0] < distance[2] / 10
    spread = [_one(histogram, "class_histogram_tv", _subject(tokens)).value for tokens in (real, one_class)]
    assert spread[0] < 0.05
    assert spread[1] > 0.8
    assert "small_classifier" in _one(frechet, "frechet_distance", _subject(real)).reference


def test_mean_pairwise_distance_is_the_mean_over_all_pairs() -> None:
    source = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 3, generator=source, dtype=torch.float64)
    pairs = [float((rows[i] - rows[j]).norm()) for i in range(12) for j in range(i)]
    assert mean_pairwise_distance(rows)[0] == pytest.approx(sum(pairs) / len(pairs))
    # Its standard error: over 400 fresh sets the means spread as the error says, within a third.
    sets = torch.randn(400, 60, 3, generator=source, dtype=torch.float64)
    found = torch.tensor([mean_pairwise_distance(one) for one in sets], dtype=torch.float64)
    assert float(found[:, 0].std()) == pytest.approx(float(found[:, 1].mean()), rel=0.33)


def test_class_metrics_tell_asked_for_from_other_classes_and_variety_from_repetition(
    digits: Digits, tmp_path: Path
) -> None:
    network = SmallClassifier(SmallClassifier.Config(), data=digits, num_classes=10, cache_directory=tmp_path)
    accuracy = ClassAccuracy(ClassAccuracy.Config(), features=network, codec=digits.codec)
    diversity = WithinClassDiversity(WithinClassDiversity.Config(), features=network, codec=digits.codec)
    for metric in (accuracy, diversity):
        assert metric.prepare()["classifier_test_accuracy"] > 0.97
        assert metric.evaluate(_subject(digits.split("test").tokens)) == [], "nothing was asked for"
    real, labels = digits.split("test").tokens, digits.split("test").labels
    assert labels is not None

    def value(metric: Metric, name: str, tokens: Tensor, asked: Tensor) -> Value:
        return _one(metric, name, dataclasses.replace(_subject(tokens), labels=asked))

    right = value(accuracy, "class_accuracy", real, labels)
    assert right.value > 0.95
    assert right.lower_is_better is False
    assert right.standard_error == pytest.approx(math.sqrt(right.value * (1 - right.value) / 450))
    assert value(accuracy, "class_accuracy", real, (labels + 1) % 10).value < 0.05
    first = torch.stack([real[labels == label][0] for label in range(10)])
    varied = value(diversity, "within_class_diversity", real, labels)
    repeated = value(diversity, "within_class_diversity", first[labels], labels)
    mixed = value(diversity, "within_class_diversity", real, labels[torch.arange(450).roll(1)])
    assert repeated.value == pytest.approx(0, abs=1e-6)
    assert 1 < varied.value < mixed.value
    assert diversity.evaluate(dataclasses.replace(_subject(real[:1]), labels=labels[:1])) == []


def test_copies_are_found_and_new_images_are_not(digits: Digits) -> None:
    metric = Copies(Copies.Config(), data=digits, codec=digits.codec)
    metric.prepare()
    train, test = digits.split("train").tokens, digits.split("test").tokens
    copied, new = (_subject(tokens) for tokens in (train[:100], test))
    assert _one(metric, "exact_copies", copied).value == 1
    assert _one(metric, "near_copies", copied).value == 1
    assert _one(metric, "exact_copies", new).value < 0.01
    assert _one(metric, "near_copies", new).value == pytest.approx(0.05, abs=0.01)
    assert metric.evaluate(_subject(train, "train")) == []
