"""Tokens drawn from a prediction where somebody looks at them, and ancestral steps made of such draws."""

from __future__ import annotations

import torch
from torch import Tensor

from dmmd_core import Draws, Prediction, Process, categorical_from_uniform


@torch.no_grad()
def draw_tokens(
    process: Process, prediction: Prediction, z: Tensor, where: Tensor, draws: Draws, *, chunk_rows: int = 0
) -> Tensor:
    """Draw ``x ~ Cat(prediction)`` at some positions; no gradient.

    Args:
        process: The noise process.
        prediction: Clean mean given z.
        z: Noisy tokens, int64 ``[batch, length]``; elsewhere they are returned, [MASK] as the last clean token.
        where: Positions to draw, bool ``[batch, length]``.
        draws: Source of noise (stream ``x``).
        chunk_rows: Rows of logits alive at a time; 0 for all at once.

    Returns:
        int64 ``[batch, length]``.
    """
    index = where.flatten().nonzero().squeeze(-1)
    uniform = draws.uniform("x", z.shape[1:]).flatten()
    x = z.clamp(max=process.vocab_size - 1).flatten()
    for rows, log_probs in prediction.chunks(index, chunk_rows or max(1, index.numel())):
        x[rows] = categorical_from_uniform(log_probs.exp(), uniform[rows])
        del log_probs
    return x.view_as(z)


@torch.no_grad()
def ancestral_step(
    process: Process,
    prediction: Prediction,
    z_t: Tensor,
    s: Tensor,
    t: Tensor,
    draws: Draws,
    *,
    wanted: Tensor | None = None,
    chunk_rows: int = 0,
) -> tuple[Tensor, Tensor]:
    """Draw ``x ~ Cat(prediction)``, then ``z_s ~ q(z_s | z_t, x)``; no gradient.

    Args:
        process: The noise process.
        prediction: Clean mean given z_t.
        z_t: Noisy tokens, int64 ``[batch, length]``.
        s: Target times, ``[batch]`` or ``[batch, length]``.
        t: Times of `z_t`.
        draws: Source of noise (streams ``x``, ``posterior`` and ``posterior_value``).
        wanted: Positions whose x the caller needs beside those that the step looks at, bool ``[batch, length]``.
        chunk_rows: Rows of logits alive at a time; 0 for all at once.

    Returns:
        x and z_s, int64 ``[batch, length]``; x is meaningless where nobody looks.
    """
    needed = process.rows_to_draw(z_t, s, t, draws)
    if wanted is not None:
        needed = needed | wanted
    x = draw_tokens(process, prediction, z_t, needed, draws, chunk_rows=chunk_rows)
    return x, process.posterior_sample(x, z_t, s, t, draws)
