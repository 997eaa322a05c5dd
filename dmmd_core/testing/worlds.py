"""Small worlds that the kit brings along: sizes, data, processes, networks and an enumerating teacher.

Everything here is written from the definitions and shares no code with any plugin, so that it can judge them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import einsum
from torch import Tensor, nn

from dmmd_core.draws import Draws
from dmmd_core.interfaces import (
    Backbone,
    Batch,
    Codec,
    Condition,
    Data,
    DataSpec,
    Denoiser,
    EnumerableData,
    FiniteData,
    Generator,
    ImageCodec,
    Images,
    Prediction,
    Process,
    Schedule,
    TablePrediction,
    TextCodec,
    per_position,
)

LETTERS = DataSpec(vocab_size=3, length=4)
PICTURES = DataSpec(vocab_size=4, length=64, grid=(8, 8), num_classes=2)


class Line(Schedule):
    """``alpha = 1 - t``."""

    def __init__(self, config: Line.Config | None = None) -> None:
        self.config = config

    def alpha(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha`."""
        return (1 - t).clamp(0, 1)

    def alpha_prime(self, t: Tensor) -> Tensor:
        """See `Schedule.alpha_prime`."""
        return -torch.ones_like(t)


class Absorbing(Process):
    """All noise is [MASK]."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size, schedule=Line())

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"masks", "soft_targets"})

    def prior(self) -> Tensor:
        """See `Process.prior`."""
        return torch.eye(self.vocab_size + 1, dtype=torch.float64)[-1]


class Even(Process):
    """Noise is any clean token."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size=vocab_size, schedule=Line())

    def prior(self) -> Tensor:
        """See `Process.prior`."""
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)


def processes(needed: set[str], vocab_size: int) -> list[Process]:
    """The kit's processes that have what is needed."""
    made: list[Process] = [Absorbing(vocab_size), Even(vocab_size)]
    return [process for process in made if needed <= process.provides(None)]


class Plain(Codec):
    """Tokens are shown as they are."""

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return tokens

    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`."""
        return torch.as_tensor(media, dtype=torch.int64)

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return "0"


class Letters(EnumerableData):
    """A chain in which a letter likes to be followed by itself, so that positions depend on each other."""

    def __init__(self, spec: DataSpec = LETTERS) -> None:
        self.spec = spec
        self.codec = Plain()

    def probabilities(self) -> Tensor:
        """See `EnumerableData.probabilities`."""
        size = self.spec.vocab_size
        first = torch.arange(1, size + 1, dtype=torch.float64)
        rows = 0.7 * torch.eye(size, dtype=torch.float64) + 0.3 / size
        sequences = self.sequences()
        probs = (first / first.sum())[sequences[:, 0]]
        for here in range(self.spec.length - 1):
            probs = probs * rows[sequences[:, here], sequences[:, here + 1]]
        return probs


class Grey(ImageCodec):
    """Four grey levels a pixel."""

    def __init__(self) -> None:
        self.vocab_size = PICTURES.vocab_size
        self.grid = (8, 8)
        self.image_shape = (1, 8, 8)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"images"})

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`."""
        return (tokens * 85).to(torch.uint8).reshape(-1, 1, 8, 8)

    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`."""
        return (torch.as_tensor(media).long() // 64).flatten(1)

    def fit(self, images: Images, cache: Any = None) -> None:
        """See `ImageCodec.fit`: there is nothing to fit."""

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return "1"


class Pictures(FiniteData):
    """Stripes along or across, with noise: 8x8 pixels of four levels, two classes."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = PICTURES
        self.codec = Grey()

    def prepare(self) -> None:
        """See `Data.prepare`."""
        for split, start, count in (("train", 0, 120), ("test", 1000, 60)):
            draws = Draws.for_range(0, 0, start, count)
            labels = draws.integers("label", 2)
            stripes = (torch.arange(8) // 2 % 2).expand(8, 8)
            clean = torch.where(labels.view(-1, 1, 1) == 0, stripes, stripes.T) * 2
            tokens = (clean + draws.integers("noise", 2, (8, 8))).flatten(1)
            self._splits[split] = Batch(tokens, labels)

    def originals(self, split: str) -> Tensor:
        """See `Data.originals`."""
        images: Tensor = self.codec.decode(self.split(split).tokens)
        return images


class Alphabet(TextCodec):
    """Three letters, a space, and a boundary."""

    def __init__(self) -> None:
        self.vocab_size, self.boundary = 5, 4

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextCodec.encode_texts`."""
        return [np.array(["abc |".index(letter) for letter in part], dtype=np.int64) for part in texts]

    def cache_key(self) -> str:
        """See `TextCodec.cache_key`."""
        return "abc"

    def decode(self, tokens: Tensor) -> list[str]:
        """See `TextCodec.decode`."""
        return ["".join("abc |"[token] for token in row) for row in tokens.tolist()]

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return hashlib.sha256(b"abc |").hexdigest()[:16]


class Sayings(FiniteData):
    """Words of three letters, sixteen tokens a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.spec = DataSpec(vocab_size=5, length=16)
        self.codec = self.alphabet = Alphabet()

    def prepare(self) -> None:
        """See `Data.prepare`."""
        words = self.alphabet.encode_texts(["abc ", "cab ", "bca ", "aab "])
        table = torch.from_numpy(np.stack(words))
        for split, start, count in (("train", 0, 200), ("test", 1000, 100)):
            self._splits[split] = Batch(table[Draws.for_range(0, 0, start, count).integers("word", 4, (4,))].flatten(1))


@dataclass(frozen=True)
class World:
    """Data of the kit with what they can do."""

    data: Data
    provides: frozenset[str]


def worlds() -> list[World]:
    """All of the kit's data, the cheapest first; not prepared."""
    return [
        World(Letters(), frozenset({"enumerable"})),
        World(Sayings(), frozenset({"text", "held_out"})),
        World(Pictures(), frozenset({"images", "labels", "grid", "held_out"})),
    ]


def spec_for(needed: set[str]) -> DataSpec:
    """Sizes with what is needed of the data."""
    return PICTURES if needed & {"grid", "labels", "images"} else LETTERS


def forward_matrix(process: Process, s: float, t: float) -> Tensor:
    """q(z_t | z_s) over input ids, float64, from the definition: keep with alpha_t / alpha_s, else draw from pi."""
    prior = process.prior()
    alpha_s, alpha_t = (float(process.alpha(torch.tensor(time, dtype=torch.float64))) for time in (s, t))
    keep = 1.0 if s == t else alpha_t / alpha_s
    return keep * torch.eye(len(prior), dtype=torch.float64) + (1 - keep) * prior.expand(len(prior), -1)


def bayes(process: Process, s: float, t: float) -> Tensor:
    """q(z_s | z_t, x) for all x, z_t and z_s by Bayes' rule, ``[vocab, inputs, inputs]``; nan where z_t cannot be."""
    clean = forward_matrix(process, 0.0, s)[: process.vocab_size]
    joint = clean.unsqueeze(1) * forward_matrix(process, s, t).T.unsqueeze(0)
    return joint / joint.sum(-1, keepdim=True)


class Enumerating(Denoiser):
    """E[x | z_t] by summing over all sequences in float64; with blocks, given the blocks before.

    Args:
        process: The noise process.
        data: A world that can be enumerated.
        block_size: Tokens per block, or None.
    """

    def __init__(self, process: Process, data: EnumerableData, block_size: int | None = None) -> None:
        super().__init__()
        self.process = process
        self.block_size = block_size
        self.sequences, self.probs = data.sequences(), data.probabilities()
        self.calls: list[tuple[Tensor, Tensor, Condition]] = []
        self.register_buffer("_here", torch.zeros(()), persistent=False)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`; notes how it was called."""
        condition = condition or Condition()
        self.calls.append((z_t, t, condition))
        before = z_t[:, :0]
        if isinstance(condition.context, Tensor):
            before = condition.context.expand(len(z_t), -1)
        return TablePrediction(self.mean(before.cpu(), z_t.cpu(), per_position(t, z_t).cpu()).log().to(z_t.device))

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """See `Denoiser.encode`: the tokens so far."""
        if self.block_size is None:
            return super().encode(tokens, condition)
        before = condition.context if condition is not None else None
        return torch.cat((before, tokens), dim=1) if isinstance(before, Tensor) else tokens

    def mean(self, before: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The mean at the positions of `z`, ``[batch, positions, vocab]``."""
        first, last = before.shape[1], before.shape[1] + z.shape[1]
        weights = self.probs.expand(len(z), -1)
        for place in range(first):
            weights = weights * (self.sequences[:, place] == before[:, place : place + 1])
        alpha = self.process.alpha(t).cpu()
        prior = self.process.prior()
        for place in range(first, last):
            here = z[:, place - first]
            agrees = self.sequences[:, place] == here.unsqueeze(-1)
            level = alpha[:, place - first].unsqueeze(-1)
            weights = weights * (level * agrees + (1 - level) * prior[here].unsqueeze(-1))
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total > 0, weights / total, 1 / weights.shape[-1])
        one_hot = nn.functional.one_hot(self.sequences[:, first:last], self.process.vocab_size).double()
        mean: Tensor = einsum(weights, one_hot, "batch sequence, sequence position token -> batch position token")
        return mean


class Mixer(Backbone):
    """A small network in which every position sees every other."""

    def __init__(
        self, *, num_inputs: int, vocab_size: int, length: int, num_classes: int | None = None, width: int = 16
    ) -> None:
        super().__init__()
        self.embedding_width = width
        self.num_classes = num_classes
        self.tokens = nn.Embedding(num_inputs, width)
        self.places = nn.Parameter(0.5 * torch.randn(length, width))
        self.labels = nn.Embedding(num_classes + 1, width) if num_classes is not None else None
        self.time = nn.Linear(1, width)
        self.mix = nn.Linear(length * width, length * width)
        self.logits = nn.Linear(width, vocab_size)

    def features(self, z_t: Tensor, t: Tensor, condition: Condition, input_noise: Tensor | None = None) -> Tensor:
        """See `Backbone.features`."""
        times = per_position(t, z_t).to(self.places.dtype).unsqueeze(-1)
        hidden = self.tokens(z_t) + self.places + self.time(times)
        if input_noise is not None:
            hidden = hidden + input_noise
        if self.labels is not None and self.num_classes is not None:
            label = condition.label
            none = torch.full((len(z_t),), self.num_classes, device=z_t.device)
            hidden = hidden + self.labels(none if label is None else label).unsqueeze(1)
        mixed: Tensor = hidden + nn.functional.silu(self.mix(hidden.flatten(1))).view_as(hidden)
        return mixed

    def head(self, features: Tensor) -> Tensor:
        """See `Backbone.head`."""
        logits: Tensor = self.logits(features)
        return logits


class Noisy(Generator):
    """A student with one Gaussian vector per position."""

    def __init__(self, *, backbone: Backbone, process: Process, length: int) -> None:
        super().__init__(backbone=backbone, process=process)
        self.length = length
        self.project = nn.Linear(4, backbone.embedding_width)
        self.latents: list[Tensor | None] = []

    @property
    def takes_latent(self) -> bool:
        """See `Denoiser.takes_latent`."""
        return True

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor:
        """See `Denoiser.draw_latent`."""
        return draws.normal("latent", (length or self.length, 4))

    def input_noise(self, latent: Tensor) -> Tensor:
        """See `Generator.input_noise`."""
        noise: Tensor = self.project(latent)
        return noise

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`; notes the latent."""
        self.latents.append(latent)
        return super().forward(z_t, t, condition, latent)


def all_rows(vocab_size: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """Every clean token with every input id, int64 ``[vocab * inputs]`` each."""
    pairs = torch.tensor(list(itertools.product(range(vocab_size), range(num_inputs))))
    return pairs[:, 0], pairs[:, 1]


@torch.no_grad()
def stir(module: nn.Module, seed: int = 0) -> None:
    """Move all parameters off their first values, so that what starts at zero hides nothing."""
    source = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=source).to(parameter))


def no_gradient_at(module: nn.Module) -> list[str]:
    """Names of the parameters that no gradient has reached, or nothing but zeros."""
    return [
        name
        for name, parameter in module.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not bool(parameter.grad.count_nonzero()))
    ]
