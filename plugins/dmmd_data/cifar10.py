"""CIFAR-10 (Krizhevsky, 2009), as torchvision keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmmd_core import FieldError, ImageSource, Picture, RunError, option
from dmmd_data.picture_files import known_split

_FOLDER = "cifar-10-batches-py"
_CLASSES = 10


class Cifar10(ImageSource):
    """50,000 training and 10,000 test images of 32x32 in ten classes, the official split."""

    num_classes = _CLASSES

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        folder: str = option("data/cifar10", help=f"folder that holds {_FOLDER}, or will hold it")
        download: bool = option(False, help="download it (170 MB) where it is not there")

    def __init__(self, config: Cifar10.Config) -> None:
        self.config = config
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, list[int]] = {}

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"labels"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a folder without the data before anything is built, unless they may be downloaded."""
        if not config.download and not (Path(config.folder) / _FOLDER).is_dir():
            raise FieldError(
                "folder",
                f"there is no {_FOLDER} in {config.folder!r}; set folder to where torchvision's CIFAR-10 is, or set "
                "download to true (170 MB from www.cs.toronto.edu)",
            )

    def prepare(self) -> None:
        """See `ImageSource.prepare`; torchvision checks the files' digests."""
        from torchvision.datasets import CIFAR10

        try:
            for split in ("train", "test"):
                found = CIFAR10(self.config.folder, train=split == "train", download=self.config.download)
                self._images[split], self._labels[split] = found.data, found.targets
        except (RuntimeError, OSError) as error:
            raise RunError(
                f"images cifar10: {self.config.folder} cannot be used ({error}); remove what is damaged, and set "
                "download to true with the network within reach, or folder to a whole copy"
            ) from error

    def size(self, split: str) -> int:
        """See `ImageSource.size`."""
        known_split(self._images, split)
        return len(self._images[split])

    def read(self, split: str, index: int) -> Picture:
        """See `ImageSource.read`."""
        from PIL import Image

        return Picture(Image.fromarray(self._images[split][index]), int(self._labels[split][index]))

    def origin(self, split: str, index: int) -> str:
        """See `ImageSource.origin`."""
        return f"image {index} of CIFAR-10's {split} split"

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`: the data are always the same."""
        return "cifar10"
