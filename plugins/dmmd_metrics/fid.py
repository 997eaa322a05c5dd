"""Frechet inception distance through torchmetrics, image by image, so that any number of samples fits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmmd_core import (
    CheckpointError,
    Codec,
    Data,
    Features,
    Metric,
    Requirement,
    Slot,
    Subject,
    Value,
    option,
    show_progress,
    slot,
)
from dmmd_core.checkpoint import load_tensors, save_tensors, verify_directory, write_directory
from dmmd_metrics.real_images import chosen_rows, image_parts, reference_name

_STATES = ("real_features_sum", "real_features_cov_sum", "real_features_num_samples")


class Fid(Metric):
    """Frechet distance of decoded samples to real images (Heusel et al., arXiv:1706.08500) by `torchmetrics`.

    The features' name stands beside every figure; only those through ``inception`` compare with published ones. The
    sums over the real images are kept in the run's cache.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        features: Slot = slot("features", "inception", help="feature network")
        reference: Literal["train", "test"] = option("train", help="split of real images to compare with")
        reference_images: int = option(0, help="most real images, chosen at random; 0 for all", minimum=0)
        batch_size: int = option(256, help="images at a time", minimum=1)

    def __init__(
        self, config: Fid.Config, *, features: Features, data: Data, codec: Codec, cache_directory: Path | None
    ) -> None:
        self.config = config
        self.network = features
        self.data = data
        self.codec = codec
        self.cache_directory = cache_directory

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("data", "images", "to look at decoded images")]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: a classifier that is trained on the spot instead of a network from elsewhere."""
        return cls.Config(**{**vars(config), "features": smoke_features(config.features)})

    def prepare(self) -> dict[str, float]:
        """See `Metric.prepare`.

        Raises:
            RunError: The data keep no real images, or the features cannot be had.
        """
        from torchmetrics.image.fid import FrechetInceptionDistance

        facts = self.network.prepare()
        split, size = self.config.reference, self.config.batch_size
        rows = chosen_rows(self.data, split, self.config.reference_images)
        first = next(image_parts(self.data, split, rows[:size], size))
        width = self.network.features(first).shape[1]
        self._reference = reference_name(self.data, split, rows, self.network.reference_name)
        self._distance = FrechetInceptionDistance(_Wrapped(self.network, width), reset_real_features=False)
        self._distance.set_dtype(torch.float64)
        folder = self.cache_directory and self.cache_directory / f"fid-{self._key(first, rows)}"
        if folder is None or not self._load(folder):
            parts = image_parts(self.data, split, rows, size)
            for images in show_progress(parts, "fid of real images", total=len(rows), unit="images", per_item=size):
                self._distance.update(images, real=True)
            if folder is not None:
                states = {name: getattr(self._distance, name) for name in _STATES}
                write_directory(folder, lambda path: save_tensors(path / "sums.safetensors", states))
        return facts

    def evaluate(self, subject: Subject) -> list[Value]:
        """See `Metric.evaluate`; nothing for fewer than two samples."""
        num = len(subject.tokens)
        if num < 2:
            return []
        self._distance.reset()
        for tokens in subject.tokens.split(self.config.batch_size):
            self._distance.update(torch.as_tensor(self.codec.decode(tokens)), real=False)
        return [Value("fid", float(self._distance.compute()), None, self._reference, num)]

    def _load(self, folder: Path) -> bool:
        try:
            verify_directory(folder)
            states = load_tensors(folder / "sums.safetensors")
            for name in _STATES:
                getattr(self._distance, name).copy_(states[name])
        except (CheckpointError, KeyError, RuntimeError):
            return False  # never written, or damaged: summed again
        return True

    def _key(self, first: Tensor, rows: Tensor) -> str:
        digest = hashlib.sha256(f"{self._reference} {self.config.batch_size}".encode())
        digest.update(first.contiguous().numpy().tobytes())
        digest.update(rows.numpy().tobytes())
        return digest.hexdigest()[:16]


class _Wrapped(nn.Module):
    """Features as torchmetrics takes them."""

    def __init__(self, network: Features, width: int) -> None:
        super().__init__()
        self.network = network
        self.num_features = width

    def forward(self, images: Tensor) -> Tensor:
        """Map images uint8 ``[n, channels, height, width]`` to features float64 ``[n, width]``."""
        return self.network.features(images)


def smoke_features(wanted: Slot) -> Slot:
    """What ``--smoke`` puts in the place of features that may need files from elsewhere."""
    if wanted.name == "small_classifier":
        return wanted
    return Slot(name="small_classifier", params={"steps": 30, "width": 8, "batch_size": 64})
