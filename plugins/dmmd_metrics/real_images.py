"""Real images that figures are compared with, in parts, so that none need be held at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dmmd_core import Data, Draws, RunError


def chosen_rows(data: Data, split: str, limit: int) -> Tensor:
    """Numbers of the images of a split, int64 ``[n]``; of a large one `limit` at random, always the same; 0 for all."""
    size = data.size(split)
    if not limit or limit >= size:
        return torch.arange(size)
    return Draws.for_range(0, 0, 0, size).uniform("real images").argsort(stable=True)[:limit].sort().values


def image_parts(data: Data, split: str, rows: Tensor, size: int) -> Iterator[Tensor]:
    """Undamaged images uint8 ``[n, channels, height, width]`` of some rows, at most `size` at a time.

    Raises:
        RunError: The data have none.
    """
    for part in rows.split(size):
        images = data.take_originals(split, part)
        if images is None:
            raise RunError(f"{type(data).__name__} keeps no real images to compare with; leave this metric out")
        yield images


def reference_name(data: Data, split: str, rows: Tensor, features: str) -> str:
    """What a figure was compared with: data, split, how many images, and through which features."""
    return f"{type(data).__name__.lower()}/{split} ({len(rows)} images), {features}"
