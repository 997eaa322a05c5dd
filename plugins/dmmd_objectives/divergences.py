"""Divergences of a student's rows from their targets, for methods whose teacher names a target."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "total_variation"]


def row_divergence(kind: Divergence, log_p: Tensor, log_target: Tensor, floor: float) -> Tensor:
    """KL(student, target), KL(target, student) or half the L1 distance, ``[rows]``.

    Args:
        kind: Which one.
        log_p: Student's log-probabilities, ``[rows, vocab]``.
        log_target: Target's, ``[rows, vocab]``; minus infinity is allowed.
        floor: Smallest target probability in ``reverse_kl``.
    """
    if kind == "total_variation":
        return (log_p.exp() - log_target.exp()).abs().sum(-1) / 2
    if kind == "reverse_kl":
        return (log_p.exp() * (log_p - log_target.clamp_min(math.log(floor)))).sum(-1)
    target = log_target.exp()
    return (torch.special.xlogy(target, target) - target * log_p).sum(-1)
