"""Writing samples so that a person can look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmd_core.interfaces import Codec


def image_grid(images: Tensor, columns: int = 0, tile: int = 64) -> Tensor:
    """Lay images out in a grid, enlarged without blurring and set apart.

    Args:
        images: uint8 ``[n, channels, height, width]``.
        columns: Images per row; 0 for a square grid.
        tile: Least width of an enlarged image in pixels.

    Returns:
        uint8 ``[3, height, width]``.
    """
    from torchvision.utils import make_grid

    scale = max(1, -(-tile // images.shape[-1]))
    large = images.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    columns = columns or max(1, round(len(images) ** 0.5))
    grid: Tensor = make_grid(large, nrow=columns, padding=max(2, scale), pad_value=255)
    return grid


def write_png(image: Tensor, path: Path) -> None:
    """Write an image, uint8 ``[3, height, width]``, as PNG."""
    from PIL import Image

    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(path, format="PNG")


def readable(codec: Codec, tokens: Tensor) -> Tensor | list[str]:
    """Decode tokens into what a person can look at.

    Args:
        codec: Decodes the tokens.
        tokens: int64 ``[n, length]``.

    Returns:
        Images, uint8 ``[n, channels, height, width]``, or a line a sample; tokens that stand for nothing are numbers.
    """
    if codec.media == "tokens":
        return [" ".join(map(str, row)) for row in tokens.tolist()]
    media: Any = codec.decode(tokens)
    return torch.as_tensor(media) if codec.media == "image" else list(media)


def write_media(codec: Codec, tokens: Tensor, folder: Path, name: str) -> list[Path]:
    """Decode tokens and write them: a PNG grid, a text file, and the tokens themselves as ``.npy``.

    Args:
        codec: Decodes the tokens.
        tokens: int64 ``[n, length]``.
        folder: Created if missing.
        name: Start of the file names.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{name}_tokens.npy"]
    np.save(written[0], tokens.numpy())
    media = readable(codec, tokens)
    if isinstance(media, Tensor):
        written.append(folder / f"{name}.png")
        write_png(image_grid(media), written[-1])
    else:
        written.append(folder / f"{name}.txt")
        written[-1].write_text("\n".join(media) + "\n", encoding="utf-8")
    return written
