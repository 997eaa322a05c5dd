"""The networks of a convolutional VQ autoencoder, and the moving averages that its codebook follows.

After van den Oord, Vinyals and Kavukcuoglu, "Neural discrete representation learning" (arXiv:1711.00937), with the
codebook of its appendix A.1 and restarts of dead codes (Dhariwal et al., "Jukebox", arXiv:2005.00341).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(8, width), width)


class Residual(nn.Module):
    """Two 3x3 convolutions around which the input is carried."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            _norm(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[n, width, rows, columns]`` to the same."""
        result: Tensor = x + self.inner(x)
        return result


class Autoencoder(nn.Module):
    """Encoder, codebook and decoder.

    Args:
        channels: Of the images.
        base: Channels at half the resolution; they double with every further halving, up to four times as many.
        levels: Number of halvings.
        blocks: Residual blocks per resolution.
        codes: Size of the codebook.
        code_width: Width of a code vector.
    """

    codes: Tensor

    def __init__(self, channels: int, base: int, levels: int, blocks: int, codes: int, code_width: int) -> None:
        super().__init__()
        widths = [base * min(2**level, 4) for level in range(max(levels, 1))]
        top = widths[-1]

        def residuals(width: int) -> list[nn.Module]:
            return [Residual(width) for _ in range(blocks)]

        # Full resolution costs most and gets one convolution only, on the way down and on the way up.
        first = nn.Conv2d(channels, base, 4, stride=2, padding=1) if levels else nn.Conv2d(channels, base, 3, padding=1)
        down = [first, *residuals(base)]
        for narrow, wide in pairwise(widths):
            down += [nn.Conv2d(narrow, wide, 4, stride=2, padding=1), *residuals(wide)]
        self.encoder = nn.Sequential(*down, _norm(top), nn.SiLU(), nn.Conv2d(top, code_width, 1))
        up = [nn.Conv2d(code_width, top, 3, padding=1), *residuals(top)]
        for wide, narrow in pairwise(widths[::-1]):
            up += [nn.Upsample(scale_factor=2.0), nn.Conv2d(wide, narrow, 3, padding=1), *residuals(narrow)]
        if levels:
            up += [nn.Upsample(scale_factor=2.0), nn.Conv2d(base, base, 3, padding=1)]
        self.decoder = nn.Sequential(*up, _norm(base), nn.SiLU(), nn.Conv2d(base, channels, 3, padding=1))
        self.register_buffer("codes", torch.zeros(codes, code_width))

    def encode(self, images: Tensor) -> Tensor:
        """Vectors ``[n, rows, columns, code_width]`` of images in [0, 1]."""
        return rearrange(self.encoder(2 * images - 1), "n width rows columns -> n rows columns width")

    def nearest(self, vectors: Tensor) -> Tensor:
        """Number of the nearest code of every vector, int64."""
        flat = vectors.flatten(0, -2)
        # |v - c|^2 without |v|^2, which is the same for every code.
        distances = self.codes.square().sum(-1) - 2 * flat @ self.codes.T
        return distances.argmin(-1).reshape(vectors.shape[:-1])

    def decode(self, vectors: Tensor) -> Tensor:
        """Images, about in [0, 1], of vectors ``[n, rows, columns, code_width]``."""
        x = self.decoder(rearrange(vectors, "n rows columns width -> n width rows columns"))
        return (x + 1) / 2


class CodebookAverages:
    """Moving averages of how often a code is used and of the vectors it stands for (arXiv:1711.00937, A.1).

    Args:
        codes: The codebook ``[codes, width]``, changed in place.
        decay: Of the averages.
        restart_below: A code used less than this share of an even use is dead.
    """

    def __init__(self, codes: Tensor, decay: float, restart_below: float) -> None:
        self.codes = codes
        self.decay = decay
        self.restart_below = restart_below
        self.counts = torch.zeros(len(codes), device=codes.device)
        self.sums = torch.zeros_like(codes)

    @torch.no_grad()
    def start(self, vectors: Tensor) -> None:
        """Put the codes where some vectors ``[codes, width]`` are, each counted once."""
        self.codes.copy_(vectors)
        self.counts.fill_(1.0)
        self.sums.copy_(vectors)

    @torch.no_grad()
    def update(self, vectors: Tensor, chosen: Tensor) -> None:
        """Follow a batch of vectors ``[n, width]`` and the numbers of their codes, int64 ``[n]``."""
        counts = torch.bincount(chosen, minlength=len(self.codes)).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, chosen, vectors)
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        used = self.counts > 1e-5
        self.codes[used] = self.sums[used] / self.counts[used].unsqueeze(1)

    @torch.no_grad()
    def restart(self, vectors: Tensor) -> int:
        """Move dead codes to vectors ``[codes, width]``, one for every code; returns how many there were."""
        even = self.counts.mean()
        dead = self.counts < self.restart_below * even
        self.codes[dead] = vectors[dead]
        self.counts[dead] = even
        self.sums[dead] = even * vectors[dead]
        return int(dead.sum())

    def state(self) -> dict[str, Tensor]:
        """The averages by name."""
        return {"counts": self.counts, "sums": self.sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore `state`."""
        self.counts.copy_(state["counts"])
        self.sums.copy_(state["sums"])
