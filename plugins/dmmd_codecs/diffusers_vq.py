"""Ready image tokenizers: any `diffusers.VQModel`, by local path or hub name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_codecs.vector_quantizer import QuantizerConfig, VectorQuantizer
from dmmd_core import FieldError, Images, RunError, hub_problem, option

_CONFIG = "config_json"


class DiffusersVQ(VectorQuantizer):
    """A `diffusers.VQModel`; the defaults are those of aMUSEd's, 16x16 tokens of 8,192 codes for 256x256 pixels.

    Only safetensors are read. The weights are kept beside the models, so that sampling needs no hub.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """Parameters."""

        path: str = option("amused/amused-256", help="a folder with config.json and weights, or a name on the hub")
        subfolder: str | None = option(None, help="folder within, for example vqvae")
        revision: str | None = option(None, help="revision on the hub")
        pixel_range: Literal["zero_one", "minus_one_one"] = option(
            "zero_one", help="what the model calls black to white: 0 to 1 as aMUSEd, or -1 to 1 as latent diffusion"
        )
        codes: int = option(8192, help="size of its codebook, so that sizes are known before it is loaded", minimum=2)
        factor: int = option(16, help="side of a token in pixels", minimum=1)
        height: int = option(256, help="image height in pixels", minimum=1)
        width: int = option(256, help="image width in pixels", minimum=1)

    def __init__(self, config: DiffusersVQ.Config) -> None:
        super().__init__(config)
        self._model: Any = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a model that is neither on this machine nor within reach."""
        super().check(config)
        folder = Path(config.path) / (config.subfolder or "")
        if Path(config.path).is_dir():
            if not (folder / "config.json").is_file():
                raise FieldError("path", f"there is no config.json in {str(folder)!r}; give the folder of a VQModel")
            return
        file = f"{config.subfolder}/config.json" if config.subfolder else "config.json"
        problem = hub_problem(config.path, file, revision=config.revision)
        if problem is not None:
            raise FieldError(
                "path",
                f"{problem}; give the folder of a diffusers VQModel (config.json and safetensors), or train a "
                "tokenizer here with vq_autoencoder",
            )

    @property
    def title(self) -> str:
        """See `ImageCodec.title`."""
        subfolder = f"/{self.config.subfolder}" if self.config.subfolder else ""
        return f"diffusers_vq {self.config.path}{subfolder}"

    def fit(self, images: Images, cache: Path | None = None) -> None:
        """See `ImageCodec.fit`; loads the model, and reads no images.

        Raises:
            RunError: It cannot be loaded, or has other sizes than the parameters say.
        """
        from diffusers import VQModel

        config = self.config
        try:
            model = VQModel.from_pretrained(
                config.path,
                subfolder=config.subfolder,
                revision=config.revision,
                torch_dtype=torch.float32,
                use_safetensors=True,
                low_cpu_mem_usage=False,
            )
        except Exception as error:  # the library raises whatever its network and file layers raise
            reason = (str(error).splitlines() or [""])[0]
            raise RunError(
                f"tokenizer {self.title} cannot be loaded ({type(error).__name__}: {reason}); give a folder with "
                "config.json and safetensors, or a name on the hub with the hub within reach"
            ) from error
        self._set(model)

    def state(self) -> dict[str, Tensor]:
        """See `Codec.state`: the weights, and the model's configuration as the bytes of its JSON."""
        model = self._ready()
        content = json.dumps({name: value for name, value in model.config.items() if not name.startswith("_")})
        return {_CONFIG: torch.frombuffer(bytearray(content.encode()), dtype=torch.uint8), **model.state_dict()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Codec.load_state`."""
        from diffusers import VQModel

        weights = dict(state)
        model = VQModel.from_config(json.loads(bytes(weights.pop(_CONFIG).numpy()).decode()))
        model.load_state_dict(weights)
        self._set(model)

    def indices(self, images: Tensor) -> Tensor:
        """See `VectorQuantizer.indices`."""
        model = self._ready()
        latents = model.encode(images if self.config.pixel_range == "zero_one" else 2 * images - 1).latents
        _, _, (_, _, indices) = model.quantize(latents)
        found: Tensor = indices.reshape(len(images), *self.grid)
        return found

    def images(self, indices: Tensor) -> Tensor:
        """See `VectorQuantizer.images`."""
        model = self._ready()
        shape = (*indices.shape, model.quantize.vq_embed_dim)
        if model.config.lookup_from_codebook:
            decoded = model.decode(indices.flatten(), force_not_quantize=True, shape=shape).sample
        else:
            vectors = model.quantize.get_codebook_entry(indices.flatten(), shape)
            decoded = model.decode(vectors, force_not_quantize=True).sample
        found: Tensor = decoded if self.config.pixel_range == "zero_one" else (decoded + 1) / 2
        return found

    def _meaning(self) -> str:
        return str(self.config.pixel_range)

    def _set(self, model: Any) -> None:
        config, found = self.config, model.config
        told = {
            "codes": (config.codes, found.num_vq_embeddings),
            "factor": (config.factor, 2 ** (len(found.block_out_channels) - 1)),
            "channels": (config.channels, found.in_channels),
        }
        wrong = [f"{name} is {said} and must be {has}" for name, (said, has) in told.items() if said != has]
        if found.out_channels != found.in_channels:
            wrong.append(f"it decodes to {found.out_channels} channels and takes {found.in_channels}")
        if wrong:
            raise RunError(f"tokenizer {self.title} has other sizes than the parameters say: {'; '.join(wrong)}")
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._fingerprint = ""

    def _ready(self) -> Any:
        if self._model is None:
            raise RunError(f"tokenizer {self.title} is not loaded yet; prepare the data first")
        return self._model
