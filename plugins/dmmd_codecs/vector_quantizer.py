"""What image tokenizers with a codebook share: batches on a device, sizes, and what is refused."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import FieldError, ImageCodec, RunError, component_device, option


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Sizes, and where the network runs; every such tokenizer takes these."""

    codes: int = option(256, help="size of the codebook", minimum=2)
    factor: int = option(4, help="side of a token in pixels", minimum=1)
    height: int = option(32, help="image height in pixels", minimum=1)
    width: int = option(32, help="image width in pixels", minimum=1)
    channels: int = option(3, help="color channels", minimum=1)
    device: str = option("auto", help="where the network runs: auto, cpu, cuda or cuda:N")
    chunk: int = option(64, help="images per network call", minimum=1)

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        if self.height % self.factor or self.width % self.factor:
            raise FieldError("factor", f"must divide {self.height} and {self.width}, got {self.factor}")


class VectorQuantizer(ImageCodec):
    """A tokenizer whose every token is the nearest of a codebook's vectors to what an encoder makes of an image.

    Args:
        config: Its `QuantizerConfig`.
    """

    def __init__(self, config: Any) -> None:
        self.config = config
        self.vocab_size = config.codes
        self.image_shape = (config.channels, config.height, config.width)
        self.grid = (config.height // config.factor, config.width // config.factor)
        self._fingerprint = ""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"images"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse devices that are not there."""
        component_device(config.device)

    @property
    def device(self) -> torch.device:
        """Where the network runs."""
        return component_device(self.config.device)

    @abstractmethod
    def indices(self, images: Tensor) -> Tensor:
        """Tokens of images in [0, 1], ``[n, channels, height, width]`` on `device`, int64 ``[n, rows, columns]``."""

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """Images, about in [0, 1], of tokens int64 ``[n, rows, columns]`` on `device`."""

    @torch.no_grad()
    def encode(self, media: Any) -> Tensor:
        """See `Codec.encode`; images uint8, the tokens on the CPU.

        Raises:
            RunError: The images have another size, or the network gives a token that the codebook does not have.
        """
        if tuple(media.shape[1:]) != self.image_shape:
            raise RunError(f"{self.title} takes images of {self.image_shape}, got {tuple(media.shape[1:])}")
        parts = [
            self.indices(part.to(self.device).float() / 255).flatten(1).cpu() for part in media.split(self.config.chunk)
        ]
        tokens = torch.cat(parts) if parts else torch.empty(0, self.length, dtype=torch.int64)
        self.check_tokens(tokens)
        return tokens

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """See `Codec.decode`; images uint8 on the CPU.

        Raises:
            RunError: A token is beyond the codebook.
        """
        self.check_tokens(tokens)
        parts = [
            self.images(part.to(self.device).unflatten(1, self.grid)).mul(255).round().clamp(0, 255).byte().cpu()
            for part in tokens.split(self.config.chunk)
        ]
        return torch.cat(parts) if parts else torch.empty(0, *self.image_shape, dtype=torch.uint8)

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`: sizes and weights."""
        if not self._fingerprint:
            digest = hashlib.sha256(f"{type(self).__name__}{self.image_shape}{self.grid}{self._meaning()}".encode())
            for name, tensor in sorted(self.state().items()):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def _meaning(self) -> str:
        """What decides a token's meaning beside sizes and weights."""
        return ""
