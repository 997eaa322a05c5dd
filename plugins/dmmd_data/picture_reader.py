"""Pictures of any source cut to one size, with what cannot be used refused or skipped."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmmd_core import BadImageError, FieldError, ImageCodec, ImageSource, RunError, option, show_progress

if TYPE_CHECKING:
    from PIL.Image import Image

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_AT_ONCE = 256
_WHOLE_BYTES = 2**32


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """How pictures are read; every image data takes these."""

    fit: Literal["exact", "crop", "stretch"] = option(
        "exact", help="images of another size: refuse, cut the largest centred part and scale it, or stretch"
    )
    convert: bool = option(False, help="convert images of other modes (grey, palette, CMYK) instead of refusing them")
    bad_images: Literal["refuse", "skip"] = option(
        "refuse", help="images that are damaged, of other size or channels, or with a label out of range"
    )
    workers: int = option(0, help="threads that read images; 0 for one per CPU core, at most 16", minimum=0)
    cache: str | None = option(None, help="folder of caches; $DMMD_CACHE or the user's cache by default")


@dataclass(frozen=True)
class Chunk:
    """Some pictures of a split.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        labels: int64 ``[n]``; zeros without labels.
        rows: Their numbers in the source, int64 ``[n]``.
    """

    images: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


class PictureReader:
    """Reads a source's pictures at the size that a codec takes.

    Args:
        source: Where they come from, prepared before anything is read.
        codec: Says size and channels.
        config: How to read.
        what: Who asks, the start of every message.

    Attributes:
        skipped: By split, how many pictures `chunks` has passed over.
    """

    def __init__(self, source: ImageSource, codec: ImageCodec, config: ReadingConfig, what: str) -> None:
        if codec.image_shape[0] not in _MODES:
            raise FieldError("", f"images have 1, 3 or 4 channels, the codec is set to {codec.image_shape[0]}")
        self.source = source
        self.shape = codec.image_shape
        self.config = config
        self.what = what
        self.skipped: dict[str, int] = {}

    def key(self) -> list[Any]:
        """What decides the pixels beside the source: for a fingerprint."""
        return [1, list(self.shape), self.config.fit, self.config.convert, self.config.bad_images]

    def read(self, split: str, index: int) -> tuple[np.ndarray, int]:
        """Read one picture, uint8 ``[channels, height, width]``, and its label, 0 without labels.

        Raises:
            BadImageError: It cannot be used; names it and says why.
        """
        picture = self.source.read(split, index)
        classes = self.source.num_classes
        if classes is not None and (picture.label is None or not 0 <= picture.label < classes):
            raise BadImageError(f"{self._origin(split, index)} has label {picture.label}, outside 0..{classes - 1}")
        try:
            pixels = self._pixels(picture.image)
        except ValueError as error:
            raise BadImageError(f"{self._origin(split, index)} {error}") from error
        return pixels, picture.label or 0

    def chunks(self, split: str) -> Iterator[Chunk]:
        """Read a whole split in order, showing progress; what cannot be used is refused or passed over and counted.

        Raises:
            RunError: A picture cannot be used and is not to be skipped, or none can.
        """
        size, used, self.skipped[split] = self.source.size(split), 0, 0
        starts = range(0, size, _AT_ONCE)
        shown = show_progress(starts, f"reading {split}", total=size, unit="images", per_item=_AT_ONCE)
        with ThreadPoolExecutor(self._workers()) as pool:
            for start in shown:
                rows = range(start, min(start + _AT_ONCE, size))
                good = []
                for row, result in zip(rows, pool.map(lambda row: self._try(split, row), rows), strict=True):
                    if not isinstance(result, BadImageError):
                        good.append((*result, row))
                    elif self.config.bad_images == "refuse":
                        raise self._refusal(result)
                self.skipped[split] += len(rows) - len(good)
                used += len(good)
                if good:
                    images, labels, kept = zip(*good, strict=True)
                    yield Chunk(np.stack(images), np.array(labels, dtype=np.int64), np.array(kept, dtype=np.int64))
        if not used:
            raise RunError(f"{self.what}: none of the {size} images of split {split!r} can be used; all were skipped")

    def some(self, split: str, rows: Tensor, *, replace: bool = False) -> Tensor:
        """Read some pictures, uint8 ``[n, channels, height, width]``.

        Args:
            split: Name of the split.
            rows: Their numbers in the source, int64 ``[n]``.
            replace: Take the next picture that can be used in the place of one that is to be skipped.

        Raises:
            RunError: A picture cannot be used.
        """

        def one(row: int) -> np.ndarray:
            size = self.source.size(split)
            for place in range(row, row + size):
                result = self._try(split, place % size)
                if not isinstance(result, BadImageError):
                    return result[0]
                if not replace or self.config.bad_images == "refuse":
                    raise self._refusal(result)
            raise RunError(f"{self.what}: none of the {size} images of split {split!r} can be used")

        with ThreadPoolExecutor(self._workers()) as pool:
            images = list(pool.map(one, rows.tolist()))
        return torch.from_numpy(np.stack(images)) if images else torch.empty(0, *self.shape, dtype=torch.uint8)

    def all(self, split: str, rows: Tensor) -> Tensor:
        """Read pictures as `some` does, if they fit into memory.

        Raises:
            RunError: They do not.
        """
        needed = len(rows) * int(np.prod(self.shape, dtype=np.int64))
        if needed > _WHOLE_BYTES:
            raise RunError(
                f"{self.what}: the {len(rows)} images of split {split!r} take {needed / 2**30:.1f} GiB and are not "
                "held at once; use metrics that read images in parts, such as fid, or fewer images"
            )
        return self.some(split, rows)

    def _try(self, split: str, row: int) -> tuple[np.ndarray, int] | BadImageError:
        try:
            return self.read(split, row)
        except BadImageError as error:
            return error

    def _refusal(self, error: BadImageError) -> BadImageError:
        return BadImageError(f"{self.what}: {error}; repair or remove it, or set bad_images to skip")

    def _origin(self, split: str, index: int) -> str:
        return self.source.origin(split, index)

    def _workers(self) -> int:
        return self.config.workers or min(16, os.cpu_count() or 1)

    def _pixels(self, image: Image) -> np.ndarray:
        """Bring an image to mode and size; raises a `ValueError` that says what is wrong with it."""
        from PIL import Image as Pillow

        channels, height, width = self.shape
        if image.mode != _MODES[channels]:
            if not self.config.convert:
                raise ValueError(
                    f"has {len(image.getbands())} channels (mode {image.mode}) where {channels} (mode "
                    f"{_MODES[channels]}) are wanted; set convert"
                )
            image = image.convert(_MODES[channels])
        if image.size != (width, height):
            if self.config.fit == "exact":
                raise ValueError(
                    f"has {image.size[0]}x{image.size[1]} pixels where {width}x{height} are wanted; set fit to crop or "
                    "stretch"
                )
            box = _centred(image.size, width / height) if self.config.fit == "crop" else None
            image = image.resize((width, height), Pillow.Resampling.BICUBIC, box=box)
        pixels = np.asarray(image)
        return np.ascontiguousarray(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


class TrainingPictures:
    """The training pictures of a reader by number, as `dmmd_core.Images`."""

    def __init__(self, reader: PictureReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        """Number of pictures, those that cannot be used among them."""
        return self.reader.source.size("train")

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Some pictures; see `dmmd_core.Images`."""
        return self.reader.some("train", rows, replace=True)


def _centred(size: tuple[int, int], aspect: float) -> tuple[float, float, float, float]:
    """The largest centred box of an aspect ratio (width over height) in an image of a size (width, height)."""
    width, height = min(size[0], size[1] * aspect), min(size[1], size[0] / aspect)
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return (left, top, left + width, top + height)
