"""Gradient Moment and the other metrics of text: exact where a result is known, sane where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmmd_codecs.characters import Characters
from dmmd_codecs.integers import Integers
from dmmd_core import Batch, DataSpec, Draws, FieldError, FiniteData, LanguageModel, RunError, Subject
from dmmd_metrics.entropy import TokenEntropy
from dmmd_metrics.language_models import Trained, TransformersCausal
from dmmd_metrics.text import (
    GenerativePerplexity,
    GradientMoment,
    Mauve,
    NgramDivergence,
    jensen_shannon,
    moment_and_error,
)

LETTERS, LENGTH = 8, 32


class Chains(FiniteData):
    """Sequences of a Markov chain whose rows are softmax(sharpness N(0, 1))."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = DataSpec(LETTERS, LENGTH)
        self.codec = Integers(Integers.Config())
        generator = torch.Generator().manual_seed(0)
        self.rows = (1.5 * torch.randn(LETTERS, LETTERS, generator=generator)).softmax(-1)

    def draw(self, num: int, seed: int, top_p: float = 1.0) -> Tensor:
        """Sequences of the chain whose transitions are cut to their nucleus."""
        generator = torch.Generator().manual_seed(seed)
        ordered, order = self.rows.sort(-1, descending=True)
        kept = ordered.masked_fill(ordered.cumsum(-1) - ordered >= top_p, 0)
        rows = torch.zeros_like(self.rows).scatter(-1, order, kept)
        tokens = torch.randint(LETTERS, (num, 1), generator=generator)
        for _ in range(LENGTH - 1):
            tokens = torch.cat((tokens, torch.multinomial(rows[tokens[:, -1]], 1, generator=generator)), 1)
        return tokens

    def prepare(self) -> None:
        self._splits = {"train": Batch(self.draw(4000, 1)), "test": Batch(self.draw(4000, 2))}


@pytest.fixture(scope="module")
def chains() -> Chains:
    data = Chains()
    data.prepare()
    return data


@pytest.fixture(scope="module")
def reference(chains: Chains, tmp_path_factory: Any) -> Trained:
    model = _trained(chains, tmp_path_factory.mktemp("reference"), steps=300)
    model.prepare()
    return model


def _trained(data: Any, folder: Path | None, **params: Any) -> Trained:
    config = Trained.Config(**{"width": 32, "depth": 1, "heads": 2, "learning_rate": 5e-3, **params})
    spec = data.spec
    return Trained(
        config, data=data, codec=data.codec, vocab_size=spec.vocab_size, length=spec.length, cache_directory=folder
    )


def _subject(tokens: Tensor, model: str = "student", denoiser: Any = None) -> Subject:
    return Subject(
        model=model, num_steps=1, tokens=tokens, labels=None, denoiser=denoiser, sampler=None, process=None,  # type: ignore[arg-type]
        draws=Draws.for_range(0, 0, 0, 1),
    )  # fmt: skip


def _moment(reference: LanguageModel, data: Any, tokens: Tensor, **params: Any) -> tuple[float, float]:
    metric = GradientMoment(GradientMoment.Config(**params), reference=reference, data=data)
    (value,) = metric.evaluate(_subject(tokens))
    assert value.standard_error is not None
    return value.value, value.standard_error


# ---- the estimator -------------------------------------------------------------------------------------------------


def test_estimate_is_unbiased_and_its_error_calibrated() -> None:
    """A quadratic l(a; x) = |a - x|^2 / 2 has gradient a - x: the moment is |a - E x|^2, known."""
    torch.manual_seed(0)
    mean = torch.tensor([0.3, -0.2, 0.0, 0.1], dtype=torch.float64)
    found = []
    for _ in range(400):
        h = mean + torch.randn(30, 4, dtype=torch.float64)
        found.append(moment_and_error(lambda h=h: iter([[row[:2], row[2:]] for row in h]), 30))  # type: ignore[misc]
    values, errors = (torch.tensor(column, dtype=torch.float64) for column in zip(*found, strict=True))
    known = float(mean.square().sum())
    assert abs(float(values.mean()) - known) < 4 * float(values.std()) / 20
    assert 0.8 < float(errors.square().mean().sqrt() / values.std()) < 1.3


def test_estimate_equals_the_sum_over_pairs() -> None:
    torch.manual_seed(0)
    h = torch.randn(7, 3, dtype=torch.float64)
    gram = h @ h.T
    pairs = float(gram.sum() - gram.trace()) / (7 * 6)

    def vectors() -> Iterator[list[Tensor]]:
        return iter([[row] for row in h])

    value, error = moment_and_error(vectors, 7)
    assert value == pytest.approx(pairs, abs=1e-12)
    left_out = []
    for i in range(7):
        rest = [j for j in range(7) if j != i]
        inner = gram[rest][:, rest]
        left_out.append(float(inner.sum() - inner.trace()) / (6 * 5))
    mean = sum(left_out) / 7
    assert error == pytest.approx(math.sqrt(6 / 7 * sum((x - mean) ** 2 for x in left_out)), abs=1e-12)


# ---- sanity of the Gradient Moment ---------------------------------------------------------------------------------


def test_real_data_are_within_three_errors_of_zero(chains: Chains, reference: Trained) -> None:
    """Twenty splits of fresh sequences that the reference has not seen; one in 370 may lie outside by chance."""
    metric = GradientMoment(GradientMoment.Config(batch_size=20), reference=reference, data=chains)
    for seed in range(20):
        (value,) = metric.evaluate(_subject(chains.draw(800, 100 + seed), model="test"))
        assert value.standard_error is not None
        assert abs(value.value) < 3 * value.standard_error, seed


def test_repetition_and_shuffling_are_caught(chains: Chains, reference: Trained) -> None:
    real = chains.draw(800, 50)
    perplexity = GenerativePerplexity(GenerativePerplexity.Config(), reference=reference)

    def figures(tokens: Tensor) -> tuple[float, float, float]:
        (value,) = perplexity.evaluate(_subject(tokens))
        return *_moment(reference, chains, tokens), value.value

    base, error, plain = figures(real)
    losses, _ = reference.losses(real)
    typical = real[(losses - losses.median()).abs().argmin()].expand(800, -1)
    repeated, _, repeated_perplexity = figures(typical)
    order = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    shuffled, _, _ = figures(real.gather(1, order))
    assert abs(repeated_perplexity / plain - 1) < 0.1, "perplexity sees nothing wrong with one row many times"
    assert repeated > base + 100 * error
    assert shuffled > base + 100 * error


def test_a_nucleus_has_a_best_size_for_the_moment_and_none_for_perplexity(chains: Chains, reference: Trained) -> None:
    """A model a little too hot is mended by a nucleus; cut further, it loses diversity, which perplexity praises."""
    hot = Chains()
    hot.rows = (chains.rows.log() / 1.3).softmax(-1)
    perplexity = GenerativePerplexity(GenerativePerplexity.Config(), reference=reference)
    sweep = [1.0, 0.95, 0.7, 0.4]
    samples = [hot.draw(800, 60, top_p) for top_p in sweep]
    moments = [_moment(reference, chains, tokens)[0] for tokens in samples]
    perplexities = [perplexity.evaluate(_subject(tokens))[0].value for tokens in samples]
    assert perplexities == sorted(perplexities, reverse=True)
    best = moments.index(min(moments))
    assert 0 < best < len(sweep) - 1, moments


def test_uncentred_moment_is_that_of_the_samples_alone(chains: Chains, reference: Trained) -> None:
    tokens = chains.draw(600, 70)
    value, _ = _moment(reference, chains, tokens, centred=False, batch_size=20)
    parameters = list(reference.module.parameters())
    rows = []
    for part in tokens.split(20):
        losses, counts = reference.losses(part)
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum() / counts.sum(), parameters)]))
    gram = torch.stack(rows).double() @ torch.stack(rows).double().T
    assert value == pytest.approx(float(gram.sum() - gram.trace()) / (30 * 29), rel=1e-4, abs=1e-8)


def test_more_samples_than_held_out_sequences_narrow_the_error(chains: Chains, reference: Trained) -> None:
    """200 held-out sequences are no bound on the samples: five times as many are used, all but what does not divide."""
    few = Chains()
    few._splits = {"train": Batch(chains.draw(10, 1)), "test": Batch(chains.draw(200, 2))}
    hot = Chains()
    hot.rows = (chains.rows.log() / 1.3).softmax(-1)
    tokens = hot.draw(1009, 80)
    metric = GradientMoment(GradientMoment.Config(batch_size=20), reference=reference, data=few)
    (many,) = metric.evaluate(_subject(tokens))
    (one,) = metric.evaluate(_subject(tokens[:200]))
    assert (many.num_samples, one.num_samples) == (1000, 200)
    assert many.standard_error is not None
    assert one.standard_error is not None
    assert many.standard_error < one.standard_error
    (known,) = GradientMoment(GradientMoment.Config(batch_size=20), reference=reference, data=chains).evaluate(
        _subject(hot.draw(4000, 81))
    )
    assert known.standard_error is not None
    assert abs(many.value - known.value) < 4 * (many.standard_error + known.standard_error)

    def gradient(part: Tensor) -> Tensor:
        losses, counts = reference.losses(part)
        parts = torch.autograd.grad(losses.sum() / counts.sum(), list(reference.module.parameters()))
        return torch.cat([part.flatten() for part in parts])

    data = metric._data(len(tokens))
    rows = [
        gradient(tokens[100 * i : 100 * (i + 1)]) - gradient(data[20 * i : 20 * (i + 1)]) for i in range(10)
    ]  # a pair is the mean over all its samples, in however many parts that is computed
    gram = torch.stack(rows).double() @ torch.stack(rows).double().T
    assert many.value == pytest.approx(float(gram.sum() - gram.trace()) / (10 * 9), rel=1e-4, abs=1e-8)


def test_gradients_left_by_training_do_not_count(chains: Chains, reference: Trained) -> None:
    tokens = chains.draw(100, 90)
    wanted = _moment(reference, chains, tokens)
    for parameter in reference.module.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    assert _moment(reference, chains, tokens) == wanted
    assert all(parameter.grad is None for parameter in reference.module.parameters())


# ---- the reference -------------------------------------------------------------------------------------------------


def test_reference_is_causal_trained_and_kept(chains: Chains, reference: Trained, tmp_path: Path) -> None:
    tokens = chains.draw(4, 3)
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % LETTERS
    before, after = (reference.module(part) for part in (tokens, changed))
    assert torch.allclose(before[:, :21], after[:, :21], atol=1e-5)
    assert not torch.allclose(before[:, 21], after[:, 21], atol=1e-5)
    stationary = -(chains.rows * chains.rows.log()).sum(-1)
    assert reference.held_out < float(stationary.max()), "it has learned the chain"
    first, second = (_trained(chains, tmp_path, steps=8) for _ in range(2))
    first.prepare()
    second._train = lambda: pytest.fail("trained twice")  # type: ignore[method-assign]
    assert second.prepare() == first.prepare()
    (folder,) = tmp_path.iterdir()
    (folder / "model.safetensors").write_bytes(b"damaged")
    third = _trained(chains, tmp_path, steps=8)
    assert third.prepare() == first.prepare()


def test_the_judged_model_cannot_be_its_own_reference(chains: Chains, reference: Trained) -> None:
    generator = nn.ModuleDict({"inner": reference.module})
    for metric in (
        GradientMoment(GradientMoment.Config(), reference=reference, data=chains),
        GenerativePerplexity(GenerativePerplexity.Config(), reference=reference),
    ):
        with pytest.raises(RunError, match="100% of its parameters in common"):
            metric.evaluate(_subject(chains.draw(100, 1), denoiser=generator))
        assert metric.evaluate(_subject(chains.draw(100, 1), denoiser=nn.Linear(3, 3)))


def _loaded(path: Path, codec: Characters, vocab_size: int, **params: Any) -> TransformersCausal:
    return TransformersCausal(TransformersCausal.Config(path=str(path), **params), codec=codec, vocab_size=vocab_size)


def test_a_model_of_transformers_scores_tokens_and_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    codec = Characters(Characters.Config(alphabet="abcd "))
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
    model.save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"ab": 0, "cd": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[UNK]").save_pretrained(tmp_path)
    tokens = torch.tensor([[0, 1, 4, 2, 3, 4, 0, 1]])
    direct = _loaded(tmp_path, codec, 7, same_tokens=True)
    direct.prepare()
    losses, counts = (part.detach() for part in direct.losses(tokens))
    log_probs = model(tokens).logits[0, :-1].detach().log_softmax(-1)
    assert float(losses) == pytest.approx(-float(log_probs.gather(-1, tokens[0, 1:, None]).sum()), rel=1e-5)
    assert counts.tolist() == [7]
    through_text = TransformersCausal(TransformersCausal.Config(path=str(tmp_path)), codec=codec, vocab_size=7)
    through_text.prepare()
    losses, counts = (part.detach() for part in through_text.losses(tokens))  # "ab cd ab" has three words
    log_probs = model(torch.tensor([[0, 1, 0]])).logits[0, :-1].detach().log_softmax(-1)
    assert float(losses) == pytest.approx(-float(log_probs[0, 1] + log_probs[1, 0]), rel=1e-5)
    assert counts.tolist() == [2]
    small = _loaded(tmp_path, codec, 9, same_tokens=True)
    with pytest.raises(RunError, match="has 8 tokens, the data 9"):
        small.prepare()
    with pytest.raises(RunError, match="with the hub within reach"):
        TransformersCausal(TransformersCausal.Config(path="nobody/nothing"), codec=codec, vocab_size=7).prepare()


# ---- n-grams and entropy -------------------------------------------------------------------------------------------


def test_jensen_shannon_of_known_frequencies() -> None:
    first, second = torch.tensor([0, 0, 1, 1]), torch.tensor([2, 2, 3])
    assert jensen_shannon(first, second) == pytest.approx(math.log(2))
    assert jensen_shannon(first, first) == pytest.approx(0)
    half = jensen_shannon(torch.tensor([0, 0]), torch.tensor([0, 1]))
    by_hand = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert half == pytest.approx(by_hand)


def test_ngrams_see_order_that_unigrams_do_not(chains: Chains) -> None:
    metric = NgramDivergence(NgramDivergence.Config(), data=chains, vocab_size=LETTERS)
    real = chains.draw(1000, 80)
    order = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)).argsort(1)
    unigram, bigram = (value.value for value in metric.evaluate(_subject(real)))
    shuffled_unigram, shuffled_bigram = (v.value for v in metric.evaluate(_subject(real.gather(1, order))))
    assert shuffled_unigram == pytest.approx(unigram)
    assert shuffled_bigram > 20 * bigram


def test_token_entropy_is_within_samples_and_pooled() -> None:
    metric = TokenEntropy(TokenEntropy.Config(), vocab_size=4)
    tokens = torch.tensor([[0, 0, 0, 0], [1, 1, 2, 2]])
    within, pooled, distinct = metric.evaluate(_subject(tokens))
    assert within.value == pytest.approx(math.log(2) / 2)
    assert within.standard_error == pytest.approx(math.log(2) / 2)
    assert pooled.value == pytest.approx(1.5 * math.log(2))
    assert distinct.value == 1


def _tiny_gpt2(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=12, n_positions=64, n_embd=8, n_layer=1, n_head=2, bos_token_id=8, eos_token_id=8, pad_token_id=8
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate("abcdefgh")} | {"[UNK]": 8}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)


@pytest.mark.filterwarnings("ignore")  # the package's own
def test_mauve_knows_the_chain_from_other_text(chains: Chains, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mauve")
    _tiny_gpt2(tmp_path / "gpt2")
    letters = Characters(Characters.Config(alphabet="abcdefgh"))
    metric = Mauve(Mauve.Config(model=str(tmp_path / "gpt2"), max_text_length=32), data=chains, codec=letters)
    Mauve.check(metric.config)
    with pytest.raises(FieldError, match="gpt2 or bert in its name"):
        Mauve.check(Mauve.Config(model="somebody/llama"))
    monkeypatch.setattr(chains, "size", lambda split: 300)
    (real,) = metric.evaluate(_subject(chains.draw(300, 90)))
    (other,) = metric.evaluate(_subject(torch.zeros(300, LENGTH, dtype=torch.int64)))
    assert real.value > 0.8
    assert other.value < 0.2
    assert (real.num_samples, real.lower_is_better) == (300, False)
