"""Real handwritten digits, 8x8 pixels, which scikit-learn carries (Alpaydin and Kaynak, UCI, 1998)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmmd_core import Batch, Codec, DataSpec, FieldError, FiniteData, ImageCodec, Slot, option, slot

_SHAPE = (1, 8, 8)
_CLASSES = 10


class Digits(FiniteData):
    """1,797 digits of 17 grey levels with labels, as pixels or as tokens of a codec fitted on the training split."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        codec: Slot = slot("codec", "kmeans_patches", help="images to tokens: kmeans_patches or pixels")
        test_fraction: float = option(0.25, help="share of the digits held out, the same in every class", above=0,
                                      below=1)  # fmt: skip
        split_seed: int = option(0, help="seed of the split", minimum=0)

    def __init__(self, config: Digits.Config, *, codec: Codec, cache_directory: Path | None = None) -> None:
        super().__init__()
        if not isinstance(codec, ImageCodec):
            raise FieldError("codec", f"must be a codec of images, got {type(codec).__name__}")
        if codec.image_shape != _SHAPE:
            raise FieldError("codec", f"must take images of shape {_SHAPE}, but is set to {codec.image_shape}")
        self.config = config
        self.codec = codec
        self.cache_directory = cache_directory
        self.spec = DataSpec(codec.vocab_size, codec.length, codec.grid, _CLASSES)
        self._originals: dict[str, Tensor] = {}

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"labels", "grid", "held_out"})

    def prepare(self) -> None:
        """See `Data.prepare`."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        raw = load_digits()
        images = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(raw.target).long()
        train, test = train_test_split(
            range(len(labels)),
            test_size=self.config.test_fraction,
            random_state=self.config.split_seed,
            stratify=raw.target,
        )
        self._originals = {"train": images[train], "test": images[test]}
        assert isinstance(self.codec, ImageCodec)
        self.codec.fit(self._originals["train"], self.cache_directory)
        self._splits = {
            name: Batch(self.codec.encode(self._originals[name]), labels[rows])
            for name, rows in (("train", train), ("test", test))
        }

    def originals(self, split: str) -> Tensor | None:
        """See `Data.originals`."""
        return self._originals[split]
