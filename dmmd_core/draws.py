"""Randomness that depends on the sample, never on the batch split or the number of processes.

Every draw is a pure function of (seed, step, stream name, global sample index, element): a counter-based
generator, Philox-4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011),
evaluated in integer tensors on the device that needs the numbers. Resuming a run therefore needs no generator
state. Uniforms are float64 in the open interval (0, 1), so categorical draws by inverse distribution function
keep tails that float32 Gumbel noise truncates.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit words per counter (Philox-4x32-10).

    Args:
        counter: Four int64 tensors of equal (broadcast) shape, each holding values below 2**32.
        key: Two Python integers below 2**32.

    Returns:
        Four int64 tensors of the counters' shape with values below 2**32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps in int64, but its bits are those of the unsigned product.
        product0 = c0 * _MULTIPLIERS[0]
        product1 = c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _MASK32) ^ c1 ^ k0,
            product1 & _MASK32,
            ((product0 >> 32) & _MASK32) ^ c3 ^ k1,
            product0 & _MASK32,
        )
        k0 = (k0 + _WEYL[0]) & _MASK32
        k1 = (k1 + _WEYL[1]) & _MASK32
    return c0, c1, c2, c3


class Draws:
    """Named random streams for one step and one set of samples.

    Args:
        seed: Seed of the run.
        step: Optimiser step or sampler step; any non-negative integer.
        sample_indices: Global sample indices, int64 ``[batch]``; the device of this tensor is where draws are made.
        scope: Prefix of the stream names, so that two users of one seed never share noise.
    """

    def __init__(self, seed: int, step: int, sample_indices: Tensor, scope: str = "") -> None:
        if sample_indices.dtype != torch.int64 or sample_indices.ndim != 1:
            raise ValueError(
                f"sample_indices must be int64 of shape [batch], got {sample_indices.dtype} "
                f"of shape {tuple(sample_indices.shape)}"
            )
        self.seed = seed
        self.step = step
        self.sample_indices = sample_indices
        self.scope = scope
        self._made: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    @classmethod
    def for_range(cls, seed: int, step: int, start: int, count: int, device: torch.device | str = "cpu") -> Draws:
        """Return draws for the samples ``start .. start + count - 1``."""
        return cls(seed, step, torch.arange(start, start + count, device=device))

    @property
    def batch(self) -> int:
        """Number of samples."""
        return int(self.sample_indices.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.sample_indices.device

    def at_step(self, step: int) -> Draws:
        """Return the same samples and scope at another step."""
        return Draws(self.seed, step, self.sample_indices, self.scope)

    def within(self, scope: str) -> Draws:
        """Return the same samples and step with streams of their own."""
        return Draws(self.seed, self.step, self.sample_indices, f"{self.scope}/{scope}")

    def select(self, rows: Tensor | slice) -> Draws:
        """Return the draws of some of the samples; their numbers are those of the whole batch."""
        return Draws(self.seed, self.step, self.sample_indices[rows], self.scope)

    def uniform(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw uniforms in the open interval (0, 1).

        Args:
            stream: Name of the stream; one name gives the same numbers every time it is asked.
            shape: Shape per sample.

        Returns:
            float64 ``[batch, *shape]`` with 52 random bits each; made once and kept, so not to be changed in place.
        """
        known = self._made.get((stream, tuple(shape)))
        if known is None:
            known = self._made[stream, tuple(shape)] = self._uniform(stream, shape)
        return known

    def _uniform(self, stream: str, shape: Sequence[int]) -> Tensor:
        count = math.prod(shape)
        lanes = (count + 1) // 2  # four 32-bit words make two float64 uniforms
        low = (self.sample_indices & _MASK32).unsqueeze(1)
        high = ((self.sample_indices >> 32) & _MASK32).unsqueeze(1)
        lane = torch.arange(lanes, device=self.device).unsqueeze(0)
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        w0, w1, w2, w3 = philox_4x32((lane, low, high, zero), self._key(stream))
        bits = torch.stack((((w0 << 20) | (w1 >> 12)), ((w2 << 20) | (w3 >> 12))), dim=-1)
        values = (bits.reshape(self.batch, 2 * lanes)[:, :count].double() + 0.5) * 2.0**-52
        return values.reshape(self.batch, *shape)

    def normal(self, stream: str, shape: Sequence[int] = ()) -> Tensor:
        """Draw standard Gaussians, float32 ``[batch, *shape]``, by the inverse distribution function."""
        gaussian: Tensor = torch.special.ndtri(self.uniform(stream, shape))
        return gaussian.float()

    def categorical(self, stream: str, probs: Tensor) -> Tensor:
        """Draw one category per sample and position.

        Args:
            stream: Name of the stream.
            probs: Non-negative weights ``[batch, *shape, categories]``.

        Returns:
            int64 ``[batch, *shape]``.
        """
        return categorical_from_uniform(probs, self.uniform(stream, probs.shape[1:-1]))

    def integers(self, stream: str, upper: int, shape: Sequence[int] = ()) -> Tensor:
        """Draw integers uniformly from ``0 .. upper - 1``, int64 ``[batch, *shape]``."""
        return (self.uniform(stream, shape) * upper).long().clamp_(max=upper - 1)

    def _key(self, stream: str) -> tuple[int, int]:
        text = f"{self.seed}:{self.step}:{self.scope}:{stream}".encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def categorical_from_uniform(probs: Tensor, uniform: Tensor) -> Tensor:
    """Draw categories exactly by the inverse distribution function in float64.

    Args:
        probs: Non-negative weights ``[..., categories]``, any float dtype; each row needs a positive sum.
        uniform: float64 uniforms in (0, 1), shape ``[...]``.

    Returns:
        int64 ``[...]``; a category of weight zero is never drawn.
    """
    cdf = probs.to(torch.float64, copy=True).cumsum_(-1)  # in place: for a large vocabulary it is twice the logits
    total = cdf[..., -1:]
    # Staying below the total keeps trailing categories of weight zero out of reach when u rounds to 1.
    target = torch.minimum(uniform.double().unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    drawn = torch.searchsorted(cdf.contiguous(), target.contiguous(), right=True).squeeze(-1)
    # Only weights that are not finite get here beyond the last category; the loss will tell of them.
    return drawn.clamp_(max=probs.shape[-1] - 1)
