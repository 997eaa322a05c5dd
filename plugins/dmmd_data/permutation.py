"""A pseudo-random permutation of any size that needs no memory."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from dmmd_core import Draws

_ROUNDS = 6


def epoch_rows(draws: Draws, size: int) -> Tensor:
    """Which examples the samples of a run are, int64 ``[batch]`` on the CPU.

    Sample i is item ``i mod size`` of epoch ``i // size``; every epoch is a permutation of its own.
    """
    indices = draws.sample_indices.cpu().numpy()
    epochs = indices // size
    rows = np.empty_like(indices)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        rows[chosen] = permuted(indices[chosen] % size, size, f"{draws.seed}:{epoch}")
    return torch.from_numpy(rows)


def permuted(places: np.ndarray, size: int, key: str) -> np.ndarray:
    """Where a permutation of ``0 .. size - 1`` sends some places: a Feistel network with cycle walking.

    Args:
        places: int64, each below `size`.
        size: Number of places, at least 1.
        key: Chooses the permutation.

    Returns:
        int64 of the same shape.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    result = np.asarray(places).astype(np.uint64)
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():  # the network permutes the next power of four; what leaves the range goes round again
        left, right = result[outside] >> half, result[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        result[outside] = (left << half) | right
        outside = result >= np.uint64(size)
    return result.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Finaliser of splitmix64 (Steele, Lea, Flood, 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
