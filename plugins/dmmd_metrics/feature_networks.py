"""Ready feature networks: Inception as everybody uses it, and any network exported to a file."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core import Features, FieldError, RunError, component_device, option

_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_SHA256_START = "6726825d"


class Inception(Features):
    """InceptionV3 with the weights of the original FID, through torchmetrics and torch-fidelity; float32."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str | None = option(None, help=f"file of the weights; by default {_WEIGHTS} in torch's hub cache")
        download: bool = option(False, help="download them (95 MB) where they are not at hand")
        layer: Literal["64", "192", "768", "2048"] = option("2048", help="which features, by their number")
        device: str = option("auto", help="where the network runs: auto, cpu, cuda or cuda:N")
        chunk: int = option(50, help="images per network call", minimum=1)

    def __init__(self, config: Inception.Config) -> None:
        self.config = config
        self._network: Any = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse weights that are not at hand, unless they may be downloaded."""
        component_device(config.device)
        file = _weights_file(config)
        if not file.is_file() and (config.path is not None or not config.download):
            raise FieldError(
                "path",
                f"there are no Inception weights at {str(file)!r}; give the file of torch-fidelity ({_WEIGHTS}), set "
                "download to true, or use other features: small_classifier, or network_file with a network of yours",
            )

    def prepare(self) -> dict[str, float]:
        """See `Features.prepare`.

        Raises:
            RunError: The weights cannot be downloaded, or are not those of this network.
        """
        if self._network is not None:
            return {}
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
        from torchmetrics.image.fid import NoTrainInceptionV3

        file = _weights_file(self.config)
        try:
            if not file.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=_SHA256_START, progress=False)
            torch.load(file, map_location="cpu", weights_only=True)  # the library would unpickle anything
            network = NoTrainInceptionV3("inception-v3-compat", [self.config.layer], str(file))
        except Exception as error:  # the library raises whatever its network and file layers raise
            reason = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"features inception: {file} cannot be used ({type(error).__name__}: {reason}); give the weights of "
                "torch-fidelity as path, or use other features"
            ) from error
        self._network = network.to(component_device(self.config.device))
        return {}

    @property
    def reference_name(self) -> str:
        """See `Features.reference_name`."""
        own = "" if self.config.path is None else f" of {Path(self.config.path).name}"
        return f"inception {self.config.layer}{own}"

    @torch.no_grad()
    def features(self, media: Tensor) -> Tensor:
        """See `Features.features`; grey images become color."""
        if self._network is None:
            raise RuntimeError("the Inception network is not loaded yet; call prepare")
        if media.shape[1] not in (1, 3):
            raise RunError(f"features inception: images must have 1 or 3 channels, got {media.shape[1]}")
        parts = media.expand(-1, 3, -1, -1).split(self.config.chunk)
        device = component_device(self.config.device)
        return torch.cat([self._network(part.to(device)).double().cpu() for part in parts])


class NetworkFile(Features):
    """A network of your own from a file: a ``.pt2`` of `torch.export` (with a dynamic batch), or TorchScript."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str = option(help="the file; must map images [n, channels, height, width] to features [n, ...]")
        pixels: Literal["uint8", "zero_one", "minus_one_one"] = option(
            "zero_one", help="what it takes: bytes, or floats with black to white as 0 to 1 or -1 to 1"
        )
        side: int | None = option(None, help="height and width that images are scaled to; null for as they are",
                                  minimum=1)  # fmt: skip
        device: str = option("auto", help="where the network runs: auto, cpu, cuda or cuda:N")
        chunk: int = option(50, help="images per network call", minimum=1)

    def __init__(self, config: NetworkFile.Config) -> None:
        self.config = config
        self._network: Any = None
        self._digest = ""

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a file that is not there."""
        component_device(config.device)
        if not Path(config.path).is_file():
            raise FieldError("path", f"there is no file {config.path!r}")

    def prepare(self) -> dict[str, float]:
        """See `Features.prepare`.

        Raises:
            RunError: The file holds no network.
        """
        if self._network is not None:
            return {}
        file, device = Path(self.config.path), component_device(self.config.device)
        try:
            with file.open("rb") as content:
                self._digest = hashlib.file_digest(content, "sha256").hexdigest()[:8]
            if file.suffix == ".pt2":
                self._network = torch.export.load(file).module().to(device)
            else:
                with warnings.catch_warnings():
                    # torch advises export, yet the networks that are passed around are still TorchScript.
                    warnings.simplefilter("ignore", FutureWarning)
                    self._network = torch.jit.load(file, map_location=device).eval()
        except Exception as error:  # the loaders raise whatever their file layers raise
            reason = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"features network_file: {file} cannot be loaded ({type(error).__name__}: {reason}); export the "
                "network with torch.export.save to a .pt2 file, or as TorchScript"
            ) from error
        return {}

    @property
    def reference_name(self) -> str:
        """See `Features.reference_name`: the file's name and the start of its SHA-256."""
        return f"network_file {Path(self.config.path).name} {self._digest}".strip()

    @torch.no_grad()
    def features(self, media: Tensor) -> Tensor:
        """See `Features.features`.

        Raises:
            RunError: The network does not take such images, or gives no row per image.
        """
        if self._network is None:
            raise RuntimeError("the network is not loaded yet; call prepare")
        rows = []
        for part in media.split(self.config.chunk):
            images = self._scaled(part.to(component_device(self.config.device)))
            try:
                found = self._network(images)
            except (RuntimeError, AssertionError) as error:
                reason = (str(error).strip().splitlines() or [""])[-1]
                raise RunError(
                    f"features network_file: {self.config.path} does not take images {list(images.shape)} of "
                    f"{images.dtype} ({reason}); set pixels and side to what it takes"
                ) from error
            if not isinstance(found, Tensor) or len(found) != len(part):
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise RunError(
                    f"features network_file: {self.config.path} gives {shape} for {len(part)} images; it must give one "
                    "tensor with a row per image"
                )
            rows.append(found.flatten(1).double().cpu())
        return torch.cat(rows)

    def _scaled(self, images: Tensor) -> Tensor:
        side = self.config.side
        if side is not None:
            size = (side, side)
            images = torch.nn.functional.interpolate(images.float(), size, mode="bilinear", antialias=True)
        if self.config.pixels == "uint8":
            return images.round().clamp(0, 255).byte()
        scaled = images.float() / 255
        return scaled if self.config.pixels == "zero_one" else 2 * scaled - 1


def _weights_file(config: Any) -> Path:
    if config.path is not None:
        return Path(config.path)
    return Path(torch.hub.get_dir()) / "checkpoints" / _WEIGHTS
