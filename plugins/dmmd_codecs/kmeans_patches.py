"""A small vector quantiser: patches of an image through k-means."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from dmmd_core import FieldError, ImageCodec, Images, option


class KMeansPatches(ImageCodec):
    """Every patch of a grey image is one token: its nearest code vector."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        codes: int = option(64, help="size of the codebook", minimum=2)
        patch: int = option(2, help="side of a patch in pixels; must divide height and width", minimum=1)
        height: int = option(8, help="image height in pixels", minimum=1)
        width: int = option(8, help="image width in pixels", minimum=1)
        seed: int = option(0, help="seed of the k-means initialisation", minimum=0)

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            if self.height % self.patch or self.width % self.patch:
                raise FieldError("patch", f"must divide {self.height} and {self.width}, got patch {self.patch}")

    def __init__(self, config: KMeansPatches.Config) -> None:
        self.config = config
        self.vocab_size = config.codes
        self.image_shape = (1, config.height, config.width)
        self.grid = (config.height // config.patch, config.width // config.patch)
        self._codes: Tensor | None = None

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"images"})

    def fit(self, images: Images, cache: Path | None = None) -> None:
        """See `ImageCodec.fit`; all images at once, and nothing is kept in a cache."""
        from sklearn.cluster import KMeans

        patches = self._patches(images[torch.arange(len(images))])
        model = KMeans(self.config.codes, n_init=1, random_state=self.config.seed).fit(patches.numpy())
        codes = torch.from_numpy(model.cluster_centers_)
        # Codes in order of brightness: neighbours in number look alike, and the order does not depend on k-means.
        self._codes = codes[codes.mean(-1).argsort(stable=True)].float().contiguous()

    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`."""
        self.check_tokens(tokens)
        rows, _ = self.grid
        patches = self._codebook()[tokens].round().clamp(0, 255).to(torch.uint8)
        side = self.config.patch
        return rearrange(patches, "n (rows columns) (h w) -> n 1 (rows h) (columns w)", rows=rows, h=side, w=side)

    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`."""
        nearest = torch.cdist(self._patches(media), self._codebook().double()).argmin(-1)
        rows, columns = self.grid
        return nearest.reshape(-1, rows * columns)

    def state(self) -> dict[str, Tensor]:
        """See `Codec.state`."""
        return {"codes": self._codebook()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Codec.load_state`."""
        self._codes = state["codes"]

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        text = f"kmeans_patches-{self.config.patch}-{self.image_shape}".encode()
        return hashlib.sha256(text + self._codebook().numpy().tobytes()).hexdigest()[:16]

    def _patches(self, images: Tensor) -> Tensor:
        side = self.config.patch
        return rearrange(images.double(), "n 1 (rows h) (columns w) -> (n rows columns) (h w)", h=side, w=side)

    def _codebook(self) -> Tensor:
        if self._codes is None:
            raise RuntimeError("the k-means codec has no codebook yet; call fit or load_state")
        return self._codes
