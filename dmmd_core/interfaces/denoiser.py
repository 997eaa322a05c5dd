"""Denoiser: anything that gives E[x | z_t]; and the prediction it returns.

Objectives, samplers and metrics meet networks, exact teachers, shaped teachers and students only through this.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmmd_core.draws import Draws
from dmmd_core.errors import UnsupportedError
from dmmd_core.interfaces.process import Process, per_position

if TYPE_CHECKING:
    from dmmd_core.interfaces.backbone import Backbone


@dataclass(frozen=True)
class Condition:
    """What a denoiser is told beside the noisy tokens.

    Attributes:
        label: Class labels, int64 ``[batch]``; the value ``num_classes`` means "no label", as None does for all.
        fixed: Positions whose token is given, bool ``[batch, length]``; they stay at t = 0.
        values: The given tokens, int64 ``[batch, length]``, read where `fixed`.
        context: What `Denoiser.encode` made of the finished blocks (its own type); None before the first block. That of
            a single sample serves a whole batch.
        clean: Clean tokens of the whole sequence, int64 ``[batch, length]``: in training all blocks are predicted at
            once, each given the clean blocks before it. Excludes `context`.
    """

    label: Tensor | None = None
    fixed: Tensor | None = None
    values: Tensor | None = None
    context: object | None = None
    clean: Tensor | None = None

    def select(self, rows: Tensor) -> Condition:
        """The condition of some of the samples, ``[rows]``.

        Raises:
            UnsupportedError: There is a context, whose samples only its denoiser can tell apart.
        """
        if self.context is not None:
            raise UnsupportedError("a context of finished blocks cannot be cut into samples; select before encoding")
        label, fixed, values, clean = (
            None if part is None else part[rows] for part in (self.label, self.fixed, self.values, self.clean)
        )
        return Condition(label=label, fixed=fixed, values=values, clean=clean)


def network_times(t: Tensor, condition: Condition) -> Tensor:
    """Times that a network is shown: a fixed position takes the latest time of its sample.

    In training all positions of a sample share one time, visible ones too; t = 0 beside noisy positions would be news
    to the network. The process goes on with t = 0 at fixed positions.

    Args:
        t: Times, ``[batch]`` or ``[batch, length]``.
        condition: Says which positions are fixed.
    """
    if condition.fixed is None or t.ndim == 1:
        return t
    return torch.where(condition.fixed, t.amax(-1, keepdim=True), t)


class Prediction(ABC):
    """A factorised prediction of the clean tokens, made row by row on demand.

    A row is one position of one sample, numbered ``sample * length + position``.
    """

    num_rows: int
    vocab_size: int

    @abstractmethod
    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """Log of the clean mean for the chosen rows (all by default), at least float32 ``[rows, vocab]``."""

    def chunks(self, rows: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(rows, log_probs)`` for at most `size` rows at a time; delete these before asking for the next."""
        for part in rows.split(size):
            yield part, self.log_probs(part)

    def at(self, rows: Tensor) -> Prediction:
        """The prediction of the chosen rows alone, numbered from 0."""
        return _At(self, rows)

    def detached(self) -> Prediction:
        """The same prediction, made without gradients."""
        return _Detached(self)

    def sources(self) -> tuple[Tensor, ...]:
        """Tensors ``[num_rows, ...]`` that log-probabilities are computed from, row by row, beside parameters.

        A loss in chunks ends each chunk's graph there and takes its gradient at once (`dmmd_core.sum_over_rows`).
        Without sources, the default, it computes every chunk again in the backward pass.
        """
        return ()

    def from_sources(self, rows: Tensor, sources: Sequence[Tensor]) -> Prediction:
        """`at`, computed from `sources`, which stand for the chosen rows of this prediction's own."""
        return self.at(rows)


class _At(Prediction):
    """Some rows of a prediction."""

    def __init__(self, inner: Prediction, rows: Tensor) -> None:
        self._inner = inner
        self._rows = rows
        self.num_rows, self.vocab_size = rows.shape[0], inner.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return self._inner.log_probs(self._rows if rows is None else self._rows[rows])


class _Detached(Prediction):
    """A prediction without its graph."""

    def __init__(self, inner: Prediction) -> None:
        self._inner = inner
        self.num_rows, self.vocab_size = inner.num_rows, inner.vocab_size

    @torch.no_grad()
    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return self._inner.log_probs(rows).detach()


class TablePrediction(Prediction):
    """A prediction whose log-probabilities are already at hand.

    Args:
        log_probs: ``[batch, length, vocab]``.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self._log_probs = log_probs.flatten(0, 1)
        self.num_rows, self.vocab_size = self._log_probs.shape

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return self._log_probs if rows is None else self._log_probs[rows]


class NetworkPrediction(Prediction):
    """Features of a backbone, turned into log-probabilities where somebody asks.

    Args:
        backbone: Gives logits for feature rows.
        process: Turns logits into the clean mean.
        features: ``[batch, length, width]``.
        z_t: Noisy tokens, int64 ``[batch, length]``.
        t: Times, ``[batch]`` or ``[batch, length]``.
    """

    def __init__(self, backbone: Backbone, process: Process, features: Tensor, z_t: Tensor, t: Tensor) -> None:
        self._backbone = backbone
        self._process = process
        self._features = features.flatten(0, 1)
        self._z = z_t.flatten()
        self._t = per_position(t, z_t).flatten()
        self.num_rows = self._features.shape[0]
        self.vocab_size = process.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`; the softmax runs in float32 or wider."""
        features, z, t = self._features, self._z, self._t
        if rows is not None:
            features, z, t = features[rows], z[rows], t[rows]
        # Passed on without a name here, so that they can be freed there.
        return self._process.clean_log_probs(self._logits(features), z, t)

    def sources(self) -> tuple[Tensor, ...]:
        """See `Prediction.sources`: the features; none where a gradient must not be taken at once.

        A class derived from this one may compute rows from more. A head sharded by FSDP2 frees its weights at the end
        of each backward pass, and a chunk's would be one.
        """
        return (self._features,) if type(self) is NetworkPrediction and not _is_sharded(self._backbone) else ()

    def from_sources(self, rows: Tensor, sources: Sequence[Tensor]) -> Prediction:
        """See `Prediction.from_sources`."""
        part = copy.copy(self)
        (part._features,) = sources
        part._z, part._t, part.num_rows = self._z[rows], self._t[rows], rows.shape[0]
        return part

    def _logits(self, features: Tensor) -> Tensor:
        logits = self._backbone.head(features)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _is_sharded(module: nn.Module) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(part, FSDPModule) for part in module.modules())


class Denoiser(nn.Module, ABC):
    """Maps noisy tokens to a factorised prediction of the clean ones.

    Attributes:
        block_size: Tokens per block, for denoisers that predict one block given those before it (`encode`); None for
            those that take whole sequences.
    """

    block_size: int | None = None

    @abstractmethod
    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """Predict E[x | z_t].

        Args:
            z_t: Noisy tokens, int64 ``[batch, length]``: the whole sequence or, with a `block_size` and without
                ``condition.clean``, the block that follows ``condition.context``.
            t: Times, ``[batch]`` or ``[batch, length]``; 0 at fixed positions.
            condition: Labels, fixed positions, context.
            latent: Input noise from `draw_latent`; None for denoisers that take none.
        """

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """Turn finished blocks into the context of the next one.

        Args:
            tokens: Clean tokens of one or more whole blocks, int64 ``[batch, tokens]``.
            condition: Labels, and the context of the blocks before, if any.

        Returns:
            The context of all blocks up to here, for `Condition.context`.

        Raises:
            UnsupportedError: This denoiser has no `block_size`.
        """
        raise UnsupportedError(f"{type(self).__name__} takes whole sequences and encodes no blocks")

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor | None:
        """Draw the input noise for one call, ``[batch, ...]``; None where there is none.

        Args:
            draws: One sample per index.
            length: Positions that the call will have; by default those of a whole sequence.
        """
        return None

    @property
    def takes_latent(self) -> bool:
        """Whether two calls on one input may differ through the latent."""
        return False


class NetworkDenoiser(Denoiser):
    """A backbone read through a process: teachers and auxiliaries.

    Args:
        backbone: The network.
        process: Its noise process.
    """

    def __init__(self, backbone: Backbone, process: Process) -> None:
        super().__init__()
        self.backbone = backbone
        self.process = process
        self.block_size = backbone.block_size

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """See `Denoiser.encode`."""
        return self.backbone.encode(tokens, condition or Condition())

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`."""
        if latent is not None:
            raise ValueError("this denoiser takes no latent; use a generator with input noise")
        condition = condition or Condition()
        features = self.backbone.features(z_t, network_times(t, condition), condition)
        return NetworkPrediction(self.backbone, self.process, features, z_t, t)
