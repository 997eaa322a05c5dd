"""Samples beside the training images that they come nearest to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dmmd_core import Data

_POOL_BYTES = 2**28
_COMPARED_SIDE = 32
_ROWS = 1000


def nearest_training_images(data: Data, samples: Tensor) -> tuple[Tensor, int]:
    """Find the nearest training image of every sample, by Euclidean distance of pixels.

    Images larger than 32 pixels a side are compared after averaging down to that. Where the training images take more
    than 256 MB, evenly spaced ones are looked at.

    Args:
        data: Its training images before any codec, where it keeps them, else after the codec.
        samples: uint8 ``[n, channels, height, width]``.

    Returns:
        The nearest images, as `samples`, and how many were looked at.
    """
    size, bytes_each = data.size("train"), samples[0].numel()
    count = max(1, min(size, _POOL_BYTES // bytes_each))
    rows = torch.linspace(0, size - 1, count).long()
    best = torch.full((len(samples),), torch.inf)
    nearest = samples.clone()
    small = _small(samples)
    for part in rows.split(_ROWS):
        images = _images(data, part)
        distances, places = torch.cdist(small, _small(images)).min(1)
        nearer = distances < best
        best[nearer], nearest[nearer] = distances[nearer], images[places[nearer]]
    return nearest, count


def beside_each_other(left: Tensor, right: Tensor) -> Tensor:
    """Interleave two batches of images: left, right, left, right, ..."""
    return torch.stack((left, right), 1).flatten(0, 1)


def _images(data: Data, rows: Tensor) -> Tensor:
    originals = data.take_originals("train", rows)
    decoded: Any = originals if originals is not None else data.codec.decode(data.take("train", rows).tokens)
    return torch.as_tensor(decoded)


def _small(images: Tensor) -> Tensor:
    images = images.float()
    if max(images.shape[-2:]) > _COMPARED_SIDE:
        images = torch.nn.functional.interpolate(images, (_COMPARED_SIDE, _COMPARED_SIDE), mode="area")
    return images.flatten(1)
