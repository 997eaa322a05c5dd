"""The process loss L_s(target, x_hat, z_s) over a batch, row by row in chunks.

``L = (1 / (B length)) sum_b w(s_b) sum_l m_bl loss_bl`` (DESIGN, "The mathematics"): never divided by the number of
rows that carry a loss; rows without one are selected away and never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmmd_core.gradients import GradientSums, Leaves
from dmmd_core.interfaces.denoiser import Prediction
from dmmd_core.interfaces.process import Process, per_position

RowLoss = Callable[..., Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that carry a loss, with all that a row's loss needs.

    Attributes:
        index: Row numbers ``sample * length + position``, int64 ``[rows]``.
        z: Noisy tokens, int64 ``[rows]``.
        s: Times, ``[rows]``.
        weight: w(s) / (batch * length), float32 ``[rows]``.
    """

    index: Tensor
    z: Tensor
    s: Tensor
    weight: Tensor

    def split(self, size: int) -> Iterator[Rows]:
        """Yield at most `size` rows at a time."""
        for start in range(0, self.index.shape[0], size):
            part = slice(start, start + size)
            yield Rows(self.index[part], self.z[part], self.s[part], self.weight[part])


def rows_with_loss(process: Process, z_s: Tensor, s: Tensor) -> Rows:
    """Select the rows of ``z_s`` ``[batch, length]`` at times ``s`` that carry a loss."""
    index = process.rows_with_loss(z_s, s).flatten().nonzero().squeeze(-1)
    times = per_position(s, z_s).flatten()[index]
    weight = process.loss_weight(times).float() / z_s.numel()
    return Rows(index, z_s.flatten()[index], times, weight)


def sum_over_rows(rows: Rows, row_loss: RowLoss, chunk_rows: int, predictions: Sequence[Prediction] = ()) -> Tensor:
    """Sum weighted row losses, at most `chunk_rows` rows of logits alive at a time.

    Gradients are computed together with the losses: a chunk's graph begins at the predictions' `Prediction.sources` and
    at parameters, is differentiated at once and freed; the backward pass hands the sums on. Where a chunk's graph
    reaches further back (a prediction that names no sources, a tensor that `row_loss` brings along), each chunk is
    computed again in the backward pass instead: the same numbers, for one more forward pass of the heads.

    Args:
        rows: All rows.
        row_loss: Called as ``row_loss(part, *parts_of_predictions)``; ``log_probs()`` of such a part gives the rows of
            `part` alone. Returns their losses ``[rows]``, or several losses: a sequence of ``[rows]``, or
            ``[losses, rows]``. Losses of a sequence that share no graph cost no more than their sum would.
        chunk_rows: Rows per chunk; 0 for one chunk, differentiated in the backward pass.
        predictions: Where the logits come from.

    Returns:
        A scalar (or ``[losses]``); zero where no row carries a loss. In chunks it cannot be differentiated twice.
    """
    if chunk_rows <= 0 or rows.index.shape[0] <= chunk_rows:
        return _total(rows, row_loss, predictions)
    total = _differentiated_at_once(rows, row_loss, chunk_rows, predictions)
    return _computed_twice(rows, row_loss, chunk_rows, predictions) if total is None else total


def _total(part: Rows, row_loss: RowLoss, predictions: Sequence[Prediction]) -> Tensor:
    losses = row_loss(part, *(prediction.at(part.index) for prediction in predictions))
    if isinstance(losses, Tensor):
        return (losses * part.weight).sum(-1)
    return torch.stack([(loss * part.weight).sum() for loss in losses])


def _computed_twice(rows: Rows, row_loss: RowLoss, chunk_rows: int, predictions: Sequence[Prediction]) -> Tensor:
    def part_total(index: Tensor, z: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        return _total(Rows(index, z, s, weight), row_loss, predictions)

    total: Any = 0.0
    for part in rows.split(chunk_rows):
        total = total + checkpoint(part_total, part.index, part.z, part.s, part.weight, use_reentrant=False)
    assert isinstance(total, Tensor)
    return total


def _differentiated_at_once(
    rows: Rows, row_loss: RowLoss, chunk_rows: int, predictions: Sequence[Prediction]
) -> Tensor | None:
    """The losses, their gradients at hand; None where a chunk's graph reaches behind the chunk."""
    sums = GradientSums()
    sources = [prediction.sources() for prediction in predictions]
    values: list[Tensor] = []
    for part in rows.split(chunk_rows):
        leaves = Leaves(part.index)
        cut = [_cut(*pair, leaves) for pair in zip(predictions, sources, strict=True)]
        with sums, _autocast_without_cache(part.index.device.type):
            losses = row_loss(part, *cut)
        single = isinstance(losses, Tensor) and losses.ndim == 1
        several = losses.reshape(-1, *part.weight.shape) if isinstance(losses, Tensor) else losses
        totals = [(loss * part.weight).sum() for loss in several]
        del losses, several
        values.append(torch.stack([total.detach() for total in totals]))
        if not sums.add(totals, leaves):
            return None
    total = sums.behind(torch.stack(values).sum(0))
    return total.squeeze(0) if single else total


def _cut(prediction: Prediction, sources: Sequence[Tensor], leaves: Leaves) -> Prediction:
    if not sources:
        return prediction.at(leaves.index)
    return prediction.from_sources(leaves.index, [leaves.cut(source) for source in sources])


def _autocast_without_cache(device: str) -> AbstractContextManager[object]:
    """Autocast as it is, but without the copies of weights it keeps, whose nodes would be shared between chunks."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
