"""The process loss L_s(target, x_hat, z_s) over a batch, row by row in chunks.

``L = (1 / (B length)) sum_b w(s_b) sum_l m_bl loss_bl`` (DESIGN, "The mathematics"): never divided by the number of
rows that carry a loss; rows without one are selected away and never multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dmmd_core.interfaces.process import Process, per_position


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


def rows_with_loss(process: Process, z_s: Tensor, s: Tensor) -> Rows:
    """Select the rows of ``z_s`` ``[batch, length]`` at times ``s`` that carry a loss."""
    index = process.rows_with_loss(z_s, s).flatten().nonzero().squeeze(-1)
    times = per_position(s, z_s).flatten()[index]
    weight = process.loss_weight(times).float() / z_s.numel()
    return Rows(index, z_s.flatten()[index], times, weight)


def sum_over_rows(rows: Rows, row_loss: Callable[[Rows], Tensor], chunk_rows: int) -> Tensor:
    """Sum weighted row losses, at most `chunk_rows` rows of logits alive at a time.

    Args:
        rows: All rows.
        row_loss: Maps a part of the rows to their losses ``[rows]`` (or several at once, ``[losses, rows]``); makes its
            own logits.
        chunk_rows: Rows per chunk; 0 for one chunk without recomputation.

    Returns:
        A scalar (or ``[losses]``); zero where no row carries a loss.
    """
    count = rows.index.shape[0]
    if chunk_rows <= 0 or count <= chunk_rows:
        return (row_loss(rows) * rows.weight).sum(-1)

    def part_loss(index: Tensor, z: Tensor, s: Tensor, weight: Tensor) -> Tensor:
        return (row_loss(Rows(index, z, s, weight)) * weight).sum(-1)

    total: Tensor | None = None
    for start in range(0, count, chunk_rows):
        part = slice(start, start + chunk_rows)
        pieces = (rows.index[part], rows.z[part], rows.s[part], rows.weight[part])
        # Recomputing a chunk's logits in the backward pass keeps only one chunk alive.
        part_total = checkpoint(part_loss, *pieces, use_reentrant=False)
        total = part_total if total is None else total + part_total
    assert total is not None
    return total
