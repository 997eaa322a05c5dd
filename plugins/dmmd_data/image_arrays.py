"""Pictures in ``.npy`` and ``.npz`` files."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dmmd_core import FieldError, ImageSource, Picture, RunError, option
from dmmd_data.hub_data import digest_of_file
from dmmd_data.picture_files import hold_out, known_split

_WHAT = "images image_arrays"
_CHANNELS = (1, 3, 4)


class ImageArrays(ImageSource):
    """Images uint8 ``[n, height, width, channels]``, ``[n, channels, height, width]`` or ``[n, height, width]``.

    A ``.npy`` file is read through a memory map, its labels come from a file of their own; a ``.npz`` file may hold
    both. Without a `test` file a share of the images is held out, chosen by their numbers alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        train: str = option(help=".npy or .npz file of the training images")
        test: str | None = option(None, help=".npy or .npz file of the test images; without it a part is held out")
        train_labels: str | None = option(None, help=".npy file of the training labels; an .npz may hold them itself")
        test_labels: str | None = option(None, help=".npy file of the test labels")
        images_key: str = option("images", help="name of the images in an .npz file")
        labels_key: str = option("labels", help="name of the labels in an .npz file")
        layout: Literal["auto", "channels_last", "channels_first"] = option(
            "auto", help="where the channels are; auto finds the axis of length 1, 3 or 4"
        )
        num_classes: int | None = option(None, help="number of classes; null for no labels", minimum=1)
        held_out: float = option(0.05, help="share held out where there is no test file", above=0, below=1)

        def __post_init__(self) -> None:
            """Check files against each other."""
            for field in ("train", "test"):
                file, labels = getattr(self, field), getattr(self, f"{field}_labels")
                if file is not None and Path(file).suffix not in (".npy", ".npz"):
                    raise FieldError(field, f"must be a .npy or .npz file, got {file!r}")
                if labels is not None and self.num_classes is None:
                    raise FieldError(f"{field}_labels", "needs num_classes")
                if labels is not None and file is None:
                    raise FieldError(f"{field}_labels", f"needs {field}, the images")
                if self.num_classes is not None and file is not None and file.endswith(".npy") and labels is None:
                    raise FieldError(f"{field}_labels", f"must be given for {file!r}, as num_classes is set")

    def __init__(self, config: ImageArrays.Config) -> None:
        self.config = config
        self.num_classes = config.num_classes
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray | None] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._digest = ""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset() if config.num_classes is None else frozenset({"labels"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse files that are not there before anything is built."""
        for field in ("train", "test", "train_labels", "test_labels"):
            file = getattr(config, field)
            if file is not None and not Path(file).is_file():
                raise FieldError(field, f"there is no file {file!r}")

    def prepare(self) -> None:
        """See `ImageSource.prepare`."""
        config = self.config
        digest = hashlib.sha256(repr(vars(config)).encode())
        for split in ("train", "test"):
            file, labels = getattr(config, split), getattr(config, f"{split}_labels")
            if file is None:
                continue
            self._images[split] = self._channels_last(_load(file, config.images_key), file)
            self._labels[split] = self._labels_of(split, file, labels)
            for path in (file, labels):
                digest.update(b"" if path is None else digest_of_file(Path(path)).encode())
        self._digest = digest.hexdigest()[:16]
        if "test" in self._images:
            self._rows = {split: np.arange(len(images)) for split, images in self._images.items()}
        else:
            self._rows = hold_out(range(len(self._images["train"])), config.held_out, _WHAT, config.train)

    def size(self, split: str) -> int:
        """See `ImageSource.size`."""
        known_split(self._rows, split)
        return len(self._rows[split])

    def read(self, split: str, index: int) -> Picture:
        """See `ImageSource.read`."""
        from PIL import Image

        part, row = self._part(split), int(self._rows[split][index])
        pixels, labels = np.ascontiguousarray(self._images[part][row]), self._labels[part]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return Picture(image, None if labels is None else int(labels[row]))

    def origin(self, split: str, index: int) -> str:
        """See `ImageSource.origin`: file and number."""
        return f"image {int(self._rows[split][index])} of {getattr(self.config, self._part(split))}"

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self._digest

    def _part(self, split: str) -> str:
        return split if split in self._images else "train"

    def _channels_last(self, images: np.ndarray, file: str) -> np.ndarray:
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or not len(images):
            raise RunError(
                f"{_WHAT}: {file} holds {images.dtype} of shape {list(images.shape)}; it must be uint8 "
                "[n, height, width, channels], [n, channels, height, width] or [n, height, width]"
            )
        if images.ndim == 3:
            return images[..., None]
        last, first = images.shape[-1] in _CHANNELS, images.shape[1] in _CHANNELS
        layout = self.config.layout
        if layout == "auto" and last == first:
            raise RunError(
                f"{_WHAT}: {file} has the shape {list(images.shape)}, which does not tell where its channels (1, 3 or "
                "4) are; set layout"
            )
        if layout == "channels_first" or (layout == "auto" and first):
            images = images.transpose(0, 2, 3, 1)
        if images.shape[-1] not in _CHANNELS:
            raise RunError(
                f"{_WHAT}: the images of {file} have {images.shape[-1]} channels in layout {layout}; 1, 3 and 4 are "
                "possible"
            )
        return images

    def _labels_of(self, split: str, file: str, labels_file: str | None) -> np.ndarray | None:
        if self.num_classes is None:
            return None
        labels = _load(labels_file or file, self.config.labels_key)
        count = len(self._images[split])
        if labels.ndim != 1 or len(labels) != count or not np.issubdtype(labels.dtype, np.integer):
            raise RunError(
                f"{_WHAT}: {labels_file or file} holds labels {labels.dtype} of shape {list(labels.shape)} for the "
                f"{count} images of {file}; they must be whole numbers of shape [{count}]"
            )
        return labels


def _load(file: str, key: str) -> np.ndarray:
    """An array of a file, ``.npy`` through a memory map.

    Raises:
        RunError: The file is damaged, holds objects, or has no such array.
    """
    try:
        if file.endswith(".npy"):
            return np.lib.format.open_memmap(file, mode="r")
        with Path(file).open("rb") as content, np.load(content, allow_pickle=False) as found:
            if key not in found:
                raise RunError(
                    f"{_WHAT}: {file} has no array {key!r}; it has {', '.join(sorted(found)) or 'none'}; set "
                    "images_key or labels_key"
                )
            array: np.ndarray = found[key]
            return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RunError(f"{_WHAT}: {file} cannot be read as NumPy's arrays ({error})") from error
