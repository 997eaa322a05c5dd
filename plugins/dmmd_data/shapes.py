"""Generated pictures, for trying things out without any data: a bright shape before a gradient."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from dmmd_core import Draws, ImageSource, Picture, option
from dmmd_data.picture_files import known_split

CLASSES = ("disc", "square", "triangle", "ring", "plus", "diamond", "bars", "checker")
_NUMBERS = 12


class Shapes(ImageSource):
    """Pictures that this component draws itself: the class is the shape, the rest (place, size, colors) is chance."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        height: int = option(32, help="height in pixels", minimum=4)
        width: int = option(32, help="width in pixels", minimum=4)
        channels: Literal[1, 3] = option(3, help="1 for grey, 3 for color")
        num_classes: int = option(len(CLASSES), help="number of shapes", minimum=1, maximum=len(CLASSES))
        train: int = option(2000, help="number of training pictures", minimum=1)
        test: int = option(500, help="number of test pictures", minimum=1)
        seed: int = option(0, help="seed of all chance", minimum=0)

    def __init__(self, config: Shapes.Config) -> None:
        self.config = config
        self.num_classes = config.num_classes
        self._sizes = {"train": config.train, "test": config.test}

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"labels"})

    def prepare(self) -> None:
        """See `ImageSource.prepare`; there is nothing to find."""

    def size(self, split: str) -> int:
        """See `ImageSource.size`."""
        known_split(self._sizes, split)
        return self._sizes[split]

    def read(self, split: str, index: int) -> Picture:
        """See `ImageSource.read`; classes come in turn."""
        from PIL import Image

        label = index % self.config.num_classes
        draws = Draws.for_range(self.config.seed, 0, index, 1).within(f"shapes/{split}")
        pixels = _draw(self.config, CLASSES[label], draws.uniform("picture", (_NUMBERS,))[0].numpy())
        return Picture(Image.fromarray(pixels[..., 0] if self.config.channels == 1 else pixels), label)

    def origin(self, split: str, index: int) -> str:
        """See `ImageSource.origin`."""
        return f"generated picture {index} of {split}"

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return hashlib.sha256(f"shapes{vars(self.config)}".encode()).hexdigest()[:16]


def _draw(config: Any, shape: str, chance: np.ndarray) -> np.ndarray:
    """Draw one picture, uint8 ``[height, width, channels]``, from numbers in (0, 1)."""
    rows = (np.arange(config.height) + 0.5) / config.height
    columns = (np.arange(config.width) + 0.5) / config.width
    y, x = np.meshgrid(rows, columns, indexing="ij")
    angle = 2 * np.pi * chance[0]
    slope = 0.5 + 0.5 * (np.cos(angle) * (2 * x - 1) + np.sin(angle) * (2 * y - 1)) / np.sqrt(2)
    radius = 0.22 + 0.16 * chance[1]
    center = radius + (1 - 2 * radius) * chance[2:4]
    inside = _coverage(shape, (x - center[0]) / radius, (y - center[1]) / radius, radius * min(x.shape))
    dark, bright = 0.45 * chance[4:7], 0.55 + 0.45 * chance[7:10]
    if config.channels == 1:
        dark, bright = dark[:1], bright[:1]
    ground = dark + 0.35 * slope[..., None] * chance[10]
    picture = ground + inside[..., None] * (bright - ground)
    return np.rint(255 * picture.clip(0, 1)).astype(np.uint8)


def _coverage(shape: str, u: np.ndarray, v: np.ndarray, pixels: float) -> np.ndarray:
    """Share of every pixel that a shape of radius 1 covers, its edge one pixel wide."""
    far, near, box = np.hypot(u, v), np.minimum(abs(u), abs(v)), np.maximum(abs(u), abs(v))
    depth = {
        "disc": 1 - far,
        "square": 0.85 - box,
        "triangle": np.minimum(0.8 - v, (v + 1 - 2 * abs(u)) / np.sqrt(5)),
        "ring": np.minimum(1 - far, far - 0.55),
        "plus": np.minimum(1 - box, 0.32 - near),
        "diamond": (1 - abs(u) - abs(v)) / np.sqrt(2),
        "bars": np.minimum(0.95 - box, abs((1.5 * v) % 1 - 0.5) / 1.5 - 0.17),
        "checker": np.minimum(0.9 - box, np.where((u > 0) == (v > 0), near, -near)),
    }[shape]
    return (0.5 + depth * pixels).clip(0, 1)
