"""What the image sources share: decoding, naming what is damaged, and holding pictures out."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmmd_core import BadImageError, RunError
from dmmd_data.held_out import is_held_out

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def decode_picture(content: Path | bytes, origin: str) -> Image:
    """Decode a file, or its content.

    Args:
        content: The file, or the bytes in it.
        origin: What it is called in messages.

    Raises:
        BadImageError: It is no image, or cut short, or larger than PIL thinks safe.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:
        raise BadImageError(f"{origin} cannot be read as an image ({error})") from error
    except Image.DecompressionBombError as error:
        raise BadImageError(f"{origin} is suspiciously large ({error})") from error


def hold_out(names: Iterable[object], share: float, what: str, where: str) -> dict[str, np.ndarray]:
    """Split pictures by their names.

    Args:
        names: One name a picture.
        share: Of the pictures that are held out.
        what: Who asks, the start of the message.
        where: What the pictures are in.

    Returns:
        Numbers of the pictures of ``train`` and ``test``, int64.

    Raises:
        RunError: One of the two is empty.
    """
    held = np.array([is_held_out(name, share) for name in names], dtype=bool)
    rows = {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}
    for split, found in rows.items():
        if not len(found):
            raise RunError(
                f"{what}: of the {len(held)} pictures in {where} none is left for split {split!r} when {share:g} are "
                "held out; give more pictures, test pictures of their own, or another held_out"
            )
    return rows


def known_split(splits: Iterable[str], name: str) -> None:
    """Raise a `KeyError` for a split that is not there."""
    if name not in splits:
        raise KeyError(f"no split {name!r}; there are {sorted(splits)} (was prepare() called?)")
