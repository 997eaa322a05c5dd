"""Images of any source, held as pixels and turned into tokens batch by batch."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dmmd_core import (
    Batch,
    Codec,
    Data,
    DataSpec,
    Draws,
    FieldError,
    ImageCodec,
    ImageSource,
    Slot,
    option,
    slot,
)
from dmmd_data.permutation import epoch_rows
from dmmd_data.picture_files import known_split
from dmmd_data.picture_reader import PictureReader, ReadingConfig
from dmmd_data.token_cache import ArrayWriter, default_cache, make_or_open, open_arrays, write_arrays

_WHAT = "data image_pixels"
_PIXELS = Slot(name="pixels", params={"levels": 256, "height": 32, "width": 32, "channels": 3})
_SMOKE_SIDE = 8


class ImagePixels(Data):
    """Images with every pixel's channels as tokens, 32x32x3 of 256 levels by default; or through another codec."""

    @dataclass(frozen=True, kw_only=True)
    class Config(ReadingConfig):
        """Parameters."""

        source: Slot = slot("image_source", "cifar10", help="where the images come from")
        codec: Slot = slot("codec", _PIXELS, help="images to tokens; gives levels, size and channels")
        flips: bool = option(False, help="mirror every training image left to right with probability one half")
        storage: Literal["memory", "disk"] = option(
            "memory", help="keep the pixels in memory, or in a memory-mapped cache that later runs find again"
        )

    def __init__(self, config: ImagePixels.Config, *, source: ImageSource, codec: Codec) -> None:
        if not isinstance(codec, ImageCodec):
            raise FieldError("codec", f"must be a codec of images, got {type(codec).__name__}")
        self.config = config
        self.source = source
        self.codec: ImageCodec = codec
        self.reader = PictureReader(source, codec, config, _WHAT)
        self.spec = DataSpec(codec.vocab_size, codec.length, codec.grid, source.num_classes)
        self._images: dict[str, np.ndarray] = {}
        self._labels: dict[str, np.ndarray] = {}
        self._skipped: dict[str, int] = {}

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"grid", "held_out"})

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: generated pictures, 8x8."""
        codec = config.codec if config.codec.name == _PIXELS.name else _PIXELS
        channels = codec.params.get("channels", 1)
        size = {"height": _SMOKE_SIDE, "width": _SMOKE_SIDE}
        return cls.Config(
            source=Slot(name="shapes", params={**size, "channels": channels, "train": 400, "test": 200}),
            codec=Slot(name=codec.name, params={**codec.params, **size}),
            flips=config.flips,
            storage=config.storage,
            cache=config.cache,
        )

    def prepare(self) -> None:
        """See `Data.prepare`: read all images, or open what was read before.

        Raises:
            RunError: The images are not there, one cannot be used, or the cache cannot be written.
        """
        self.source.prepare()
        cache = Path(self.config.cache) if self.config.cache else default_cache()
        if self.config.storage == "memory":
            for split in ("train", "test"):
                self._images[split], self._labels[split] = self._read(split)
            self._skipped = dict(self.reader.skipped)
        else:
            key = hashlib.sha256(repr([self.source.fingerprint(), *self.reader.key()]).encode()).hexdigest()[:16]
            arrays, facts = make_or_open(cache / f"images-{key}", open_arrays, self._write, _WHAT)
            for split in ("train", "test"):
                self._images[split], self._labels[split] = arrays[f"{split}_images"], arrays[f"{split}_labels"]
            self._skipped = facts["skipped"]
        self.codec.fit(_Held(self._images["train"]), cache)

    def facts(self) -> dict[str, float]:
        """See `Data.facts`: how many images were skipped, where any may be."""
        if self.config.bad_images == "refuse":
            return {}
        return {f"skipped_{split}_images": count for split, count in self._skipped.items()}

    def size(self, split: str) -> int:
        """See `Data.size`."""
        known_split(self._images, split)
        return len(self._images[split])

    def take(self, split: str, indices: Tensor) -> Batch:
        """See `Data.take`."""
        return Batch(self.codec.encode(self.take_originals(split, indices)), self._labels_of(split, indices))

    def split(self, name: str) -> Batch:
        """See `Data.split`; for images whose tokens fit into memory."""
        return self.take(name, torch.arange(self.size(name)))

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`; every epoch is a fresh permutation, every visit of an image a fresh flip."""
        rows = epoch_rows(draws, self.size("train"))
        images = self.take_originals("train", rows)
        if self.config.flips:
            mirrored = (draws.uniform("flip") < 0.5).cpu()
            images[mirrored] = images[mirrored].flip(-1)
        return Batch(self.codec.encode(images), self._labels_of("train", rows)).to(draws.device)

    def originals(self, split: str) -> Tensor:
        """See `Data.originals`."""
        return self.take_originals(split, torch.arange(self.size(split)))

    def take_originals(self, split: str, indices: Tensor) -> Tensor:
        """See `Data.take_originals`."""
        known_split(self._images, split)
        return torch.from_numpy(np.asarray(self._images[split][indices.numpy()]))

    def _labels_of(self, split: str, rows: Tensor) -> Tensor | None:
        if self.source.num_classes is None:
            return None
        return torch.from_numpy(np.asarray(self._labels[split][rows.numpy()]))

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        size, filled = self.source.size(split), 0
        images, labels = np.empty((size, *self.reader.shape), np.uint8), np.empty(size, np.int64)
        for chunk in self.reader.chunks(split):
            part = slice(filled, filled + len(chunk.rows))
            images[part], labels[part] = chunk.images, chunk.labels
            filled = part.stop
        return images[:filled], labels[:filled]

    def _write(self, path: Path) -> None:
        def fill(writer: ArrayWriter) -> dict[str, Any]:
            for split in ("train", "test"):
                for chunk in self.reader.chunks(split):
                    writer.append(f"{split}_images", chunk.images)
                    writer.append(f"{split}_labels", chunk.labels)
            return {"skipped": self.reader.skipped}

        write_arrays(path, fill, _WHAT)


class _Held:
    """Images in memory or in a memory map, as `dmmd_core.Images`."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.images[rows.numpy()]))
