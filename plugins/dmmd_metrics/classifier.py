"""A small classifier fitted on the real training images; its hidden layer is a feature space."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmmd_core import CheckpointError, Data, Draws, Features, Requirement, option, show_progress
from dmmd_core.checkpoint import load_tensors, load_weights, save_tensors, verify_directory, write_directory


class SmallClassifier(Features):
    """Two convolutions and a hidden layer; fitted once, kept in the run's cache, the same for every seed of the run."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        width: int = option(32, help="channels of the first convolution", minimum=1)
        features: int = option(32, help="width of the hidden layer that serves as feature space", minimum=2)
        steps: int = option(600, help="optimiser steps", minimum=1)
        batch_size: int = option(128, help="images per step", minimum=1)
        seed: int = option(0, help="seed; figures compare only between equal seeds", minimum=0)

    def __init__(
        self, config: SmallClassifier.Config, *, data: Data, num_classes: int | None, cache_directory: Path | None
    ) -> None:
        self.config = config
        self.data = data
        self.num_classes = num_classes or 0
        self.cache_directory = cache_directory
        self._network: nn.Sequential | None = None

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"classes"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("data", "images", "to fit a classifier of images"),
            Requirement("data", "labels", "to fit a classifier"),
            Requirement("data", "held_out", "to report its accuracy"),
        ]

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        return cls.Config(**{**vars(config), "steps": min(config.steps, 30)})

    def prepare(self) -> dict[str, float]:
        """See `Features.prepare`; reports the accuracy on the held-out split."""
        images, labels = self.data.originals("train"), self.data.split("train").labels
        test, truth = self.data.originals("test"), self.data.split("test").labels
        assert images is not None
        assert labels is not None
        assert test is not None
        assert truth is not None
        self._network = self._load_or_fit(images, labels)
        accuracy = (self.classify(test) == truth).double().mean()
        return {"classifier_test_accuracy": float(accuracy)}

    @property
    def reference_name(self) -> str:
        """See `Features.reference_name`."""
        return f"small_classifier seed {self.config.seed}"

    @torch.no_grad()
    def features(self, media: Tensor) -> Tensor:
        """See `Features.features`."""
        network = self._ready()
        return torch.cat([network[:-1](_scale(part)) for part in media.split(1000)]).double()

    @torch.no_grad()
    def classify(self, media: Tensor) -> Tensor:
        """See `Features.classify`."""
        network = self._ready()
        return torch.cat([network(_scale(part)).argmax(-1) for part in media.split(1000)])

    def _ready(self) -> nn.Sequential:
        if self._network is None:
            raise RuntimeError("the classifier is not fitted yet; call prepare")
        return self._network

    def _load_or_fit(self, images: Tensor, labels: Tensor) -> nn.Sequential:
        network = self._build(images.shape[1:])
        digest = hashlib.sha256(repr(self.config).encode() + images.numpy().tobytes() + labels.numpy().tobytes())
        folder = self.cache_directory and self.cache_directory / f"small_classifier-{digest.hexdigest()[:16]}"
        if folder is None or not _load(network, folder):
            self._fit(network, images, labels)
            if folder is not None:
                folder.parent.mkdir(parents=True, exist_ok=True)
                write_directory(folder, lambda path: save_tensors(path / "model.safetensors", network.state_dict()))
        return network.eval().requires_grad_(False)

    def _build(self, shape: torch.Size) -> nn.Sequential:
        channels, height, width = shape
        wide = self.config.width
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed every accelerator, which fork_rng does not put back here.
            torch.default_generator.manual_seed(self.config.seed)
            return nn.Sequential(
                nn.Conv2d(channels, wide, 3, padding=1),
                nn.ReLU(),
                nn.Conv2d(wide, 2 * wide, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(2 * wide * -(-height // 2) * -(-width // 2), self.config.features),
                nn.ReLU(),
                nn.Linear(self.config.features, self.num_classes),
            )

    def _fit(self, network: nn.Sequential, images: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
        for step in show_progress(range(self.config.steps), "classifier of the metrics", total=self.config.steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / self.config.steps)
            draws = Draws.for_range(self.config.seed, step, 0, self.config.batch_size)
            rows = draws.integers("batch", len(labels))
            loss = nn.functional.cross_entropy(network(_scale(images[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _load(network: nn.Module, folder: Path) -> bool:
    try:
        verify_directory(folder)
        load_weights(network, load_tensors(folder / "model.safetensors"), str(folder))
    except CheckpointError:
        return False  # never written, or damaged: fitted again
    return True


def _scale(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1
