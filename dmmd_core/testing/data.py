"""Clauses for data, and for the codec that they carry."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from dmmd_core.draws import Draws
from dmmd_core.interfaces import Batch, Data, DataSpec, EnumerableData, TextCodec
from dmmd_core.testing.report import Breach, Clause, Skip, clause, expect, expect_close, expect_frequencies
from dmmd_core.testing.subject import GENERAL, Case

_BATCH = 24


class DataCase(Case):
    """Data, prepared once; `again` is a second instance, as another process would make it."""

    def prepare(self) -> None:
        """Offer a cache that nothing else uses."""
        self.folder = tempfile.TemporaryDirectory(prefix="dmmd-conformance-")
        self.offers = {"cache_directory": Path(self.folder.name)}
        self.spec_at_once: Any = None

    def close(self) -> None:
        """See `Case.close`."""
        self.folder.cleanup()

    def ready(self, number: int = 0) -> Data:
        """Prepared data; another number is another instance."""
        if number not in self.made:
            self.made[number] = self.fresh()
        key = -1 - number
        if key not in self.made:
            self.spec_at_once = getattr(self.made[number], "spec", None)
            self.made[number].prepare()
            self.made[key] = True
        data: Data = self.made[number]
        return data

    def batch(self, draws: Draws | None = None, number: int = 0) -> Batch:
        """A training batch."""
        return self.ready(number).training_batch(draws or Draws.for_range(0, 0, 0, _BATCH))

    def inner_codec(self) -> Any:
        """The data's codec."""
        return self.ready().codec


@clause("spec", remedy="set self.spec = DataSpec(...) and self.codec in the constructor, from the Config alone")
def spec(case: DataCase) -> None:
    """Sizes are known before anything is read, are the same afterwards, and make sense."""
    data = case.ready()
    first = case.spec_at_once
    expect(isinstance(first, DataSpec), f"before prepare(), spec is {first!r}")
    expect(first == data.spec, f"prepare() changed spec from {first} to {data.spec}")
    expect(first.vocab_size >= 2 and first.length >= 1, f"spec is {first}")
    places = first.length if first.grid is None else math.prod(first.grid)
    expect(places == first.length, f"the grid {first.grid} has {places} places, length is {first.length}")
    for capability, known in (("grid", first.grid), ("labels", first.num_classes)):
        if capability in case.provides:
            expect(known is not None, f"it provides {capability!r}, but spec is {first}")


@clause("batch", remedy="return Batch(tokens int64 [batch, length], labels int64 [batch] where there are classes)")
def batch(case: DataCase) -> None:
    """A training batch has one row of known tokens per sample index, and labels in range."""
    data, got = case.ready(), case.batch()
    wanted = [_BATCH, data.spec.length]
    expect(list(got.tokens.shape) == wanted, f"tokens have shape {list(got.tokens.shape)}, expected {wanted}")
    expect(got.tokens.dtype == torch.int64, f"tokens are {got.tokens.dtype}, expected int64")
    low, high, size = int(got.tokens.min()), int(got.tokens.max()), data.spec.vocab_size
    expect(low >= 0 and high < size, f"tokens are {low}..{high}, expected 0..{size - 1}")
    classes = data.spec.num_classes
    agree = (got.labels is None) == (classes is None)
    expect(agree, f"num_classes is {classes}, labels are {type(got.labels).__name__}")
    if got.labels is not None and classes is not None:
        expect(got.labels.dtype == torch.int64 and got.labels.shape == (_BATCH,), "labels are not int64 [batch]")
        expect(int(got.labels.min()) >= 0 and int(got.labels.max()) < classes, f"labels leave 0..{classes - 1}")


def _same(first: Batch, second: Batch) -> bool:
    labels = (first.labels is None) == (second.labels is None)
    if first.labels is not None and second.labels is not None:
        labels = torch.equal(first.labels, second.labels)
    return torch.equal(first.tokens, second.tokens) and labels


@clause("repeatable", remedy="choose examples by draws.sample_indices and draws.seed alone")
def repeatable(case: DataCase) -> None:
    """The sample index decides the example: in any batch, in any process, as often as it is asked for."""
    draws = Draws.for_range(3, 2, 1000, _BATCH)
    whole = case.batch(draws)
    expect(_same(whole, case.batch(draws)), "the same Draws give another batch")
    part = case.batch(draws.select(slice(10, None)))
    labels = None if whole.labels is None else whole.labels[10:]
    expect(_same(part, Batch(whole.tokens[10:], labels)), "a part of a batch differs from the whole batch's")
    expect(_same(whole, case.batch(draws, 1)), "a second instance, prepared anew, gives another batch")
    other = case.batch(Draws.for_range(3, 2, 5000, _BATCH))
    expect(not torch.equal(whole.tokens, other.tokens), "other sample indices give the same examples")


@clause("untouched", remedy="return a copy, not a view of what is kept")
def untouched(case: DataCase) -> None:
    """Who changes a batch does not change the data."""
    first = case.batch()
    kept = first.tokens.clone()
    first.tokens.fill_(0)
    expect(torch.equal(case.batch().tokens, kept), "a batch that was overwritten came back so")


@clause("splits", remedy="give both splits, sizes and parts that agree, and a KeyError for any other name")
def splits(case: DataCase) -> None:
    """There are splits train and test; `size`, `take` and `split` agree; another name is a KeyError."""
    data = case.ready()
    for name in ("train", "test"):
        size = data.size(name)
        expect(size > 0, f"split {name!r} is empty")
        rows = torch.tensor([size - 1, 0, size // 2])
        taken = data.take(name, rows)
        expect(list(taken.tokens.shape) == [3, data.spec.length], f"take of 3 gives {list(taken.tokens.shape)}")
        if size <= 5000:
            whole = data.split(name)
            expect(len(whole) == size, f"size({name!r}) is {size}, the split has {len(whole)}")
            expect(torch.equal(whole.tokens[rows], taken.tokens), f"take({name!r}, ...) gives other rows than split")
    for method in (data.split, data.size):
        try:
            method("no such split")
        except KeyError:
            continue
        raise Breach(f"{method.__name__} of a split that does not exist raises no KeyError")


@clause("facts", remedy="return a dict of str to finite float")
def facts(case: DataCase) -> None:
    """`facts` are finite numbers by name."""
    for name, value in case.ready().facts().items():
        expect(isinstance(name, str) and math.isfinite(value), f"facts() says {name!r}: {value!r}")


@clause("probabilities", remedy="let probabilities, sequences and training_batch speak of one distribution")
def probabilities(case: DataCase) -> None:
    """What can be enumerated: probabilities sum to 1, and training batches follow them."""
    data = case.ready()
    if "enumerable" not in case.provides:
        raise Skip("it does not provide enumerable")
    assert isinstance(data, EnumerableData)
    probs, sequences = data.probabilities(), data.sequences()
    size = data.spec.vocab_size**data.spec.length
    expect(probs.shape == (size,) and probs.dtype == torch.float64, f"they are {probs.dtype} {list(probs.shape)}")
    expect(bool((probs >= 0).all()) and abs(float(probs.sum()) - 1) < 1e-9, f"they sum to {float(probs.sum())!r}")
    weights = data.spec.vocab_size ** torch.arange(data.spec.length - 1, -1, -1)
    numbers = (sequences * weights).sum(-1)
    expect(torch.equal(numbers, torch.arange(size)), "sequences() are not in order, first position most significant")
    tokens = data.training_batch(Draws.for_range(0, 0, 0, 20_000)).tokens
    expect_frequencies((tokens * weights).sum(-1), probs, "training_batch, by the number of the sequence")


@clause("codec", remedy="decode [n, length] to n pieces of the media that the codec names, and encode them")
def codec(case: DataCase) -> None:
    """The codec shows tokens as its media, and turns media into tokens of the same form."""
    data, made = case.ready(), case.inner_codec()
    tokens = data.take("train", torch.arange(min(4, data.size("train")))).tokens
    shown = made.decode(tokens)
    expect(len(shown) == len(tokens), f"decode of {len(tokens)} samples gives {len(shown)}")
    if made.media == "image":
        pictures = isinstance(shown, torch.Tensor) and shown.dtype == torch.uint8 and shown.ndim == 4
        expect(pictures, "images must be uint8 [n, channels, height, width]")
    if made.media == "text":  # several token sequences may show one way
        expect(all(isinstance(one, str) for one in shown), "decode must give str")
        return
    back = made.encode(shown)
    expect(back.shape == tokens.shape and back.dtype == torch.int64, f"encode gives {back.dtype} {list(back.shape)}")
    high = int(back.max())
    expect(int(back.min()) >= 0 and high < data.spec.vocab_size, f"encode gives the token {high}")


@clause("codec_state", remedy="keep what was fitted in state(), restore it in load_state, and hash it in fingerprint")
def codec_state(case: DataCase) -> None:
    """A codec of a new instance, given the state, has the same fingerprint and shows the same."""
    made = case.inner_codec()
    state = made.state()
    expect(all(isinstance(value, torch.Tensor) for value in state.values()), "state() holds more than tensors")
    other = case.fresh().codec
    other.load_state({name: value.clone() for name, value in state.items()})
    prints = made.fingerprint(), other.fingerprint()
    expect(isinstance(prints[0], str) and re.fullmatch(r"[\w.:-]+", prints[0]), f"the fingerprint is {prints[0]!r}")
    expect(prints[0] == prints[1], f"the fingerprint was {prints[0]} and is {prints[1]} with the state loaded")
    tokens = case.batch().tokens[:3]
    shown, again = made.decode(tokens), other.decode(tokens)
    if isinstance(shown, torch.Tensor):
        expect_close(again, shown, "what decode shows with the state loaded", tolerance=0)
    else:
        expect(shown == again, f"with the state loaded, decode shows {again[0]!r} instead of {shown[0]!r}")
    if isinstance(made, TextCodec):
        expect(made.vocab_size <= case.ready().spec.vocab_size, "the tokenizer has more tokens than spec.vocab_size")


@clause("devices", remedy="move the batch to draws.device")
def devices(case: DataCase) -> None:
    """A training batch lies on the device of the Draws, with the same examples."""
    if not torch.cuda.is_available():
        raise Skip("there is no CUDA device here")
    got = case.batch(Draws.for_range(0, 0, 0, _BATCH, "cuda"))
    expect(got.tokens.device.type == "cuda", f"the batch lies on {got.tokens.device}")
    expect(torch.equal(got.tokens.cpu(), case.batch().tokens), "CPU and CUDA get different examples")


CLAUSES: tuple[Clause, ...] = (
    *GENERAL, spec, batch, repeatable, untouched, splits, facts, probabilities, codec, codec_state, devices,
)  # fmt: skip
