"""An image tokenizer that is trained here, so that a whole run needs nothing ready-made."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from dmmd_codecs.autoencoder import Autoencoder, CodebookAverages
from dmmd_codecs.vector_quantizer import QuantizerConfig, VectorQuantizer
from dmmd_core import CheckpointError, Draws, FieldError, Images, RunError, option, show_progress
from dmmd_core.checkpoint import (
    flatten_optimizer,
    load_newest,
    load_tensors,
    load_weights,
    prune,
    restore_optimizer,
    save_checkpoint,
    save_tensors,
    verify_directory,
    write_directory,
)

_SEEN = 256
_SETTLE = 0.2  # share of the steps, the last ones, without restarts
_NOT_IN_KEY = ("device", "chunk", "checkpoint_every")


class VQAutoencoder(VectorQuantizer):
    """A small convolutional VQ autoencoder, trained on the training images with squared error and kept in the cache.

    The codebook follows moving averages, gradients pass straight through it, dead codes start anew. Without a
    perceptual or adversarial loss its pictures are blurred where codes are few; a ready tokenizer is sharper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(QuantizerConfig):
        """Parameters."""

        base_channels: int = option(64, help="channels at half resolution, up to four times as many below", minimum=4)
        blocks: int = option(1, help="residual blocks per resolution", minimum=0)
        code_width: int = option(16, help="width of a code vector", minimum=1)
        steps: int = option(10000, help="training steps", minimum=1)
        batch_size: int = option(64, help="images per step", minimum=1)
        learning_rate: float = option(5e-4, help="peak learning rate of Adam, falling to zero on a cosine", above=0)
        commitment: float = option(0.25, help="weight of the encoder's distance to its code", minimum=0)
        decay: float = option(0.98, help="decay of the codebook's moving averages", minimum=0, below=1)
        restart_below: float = option(
            0.1, help="a code used less than this share of an even use starts anew; 0 for never", minimum=0, below=1
        )
        seed: int = option(0, help="seed of weights, batches and restarts", minimum=0)
        checkpoint_every: int = option(1000, help="steps between checkpoints of an unfinished training", minimum=1)

        def __post_init__(self) -> None:
            """Check sizes against each other."""
            super().__post_init__()
            if self.factor & (self.factor - 1):
                raise FieldError("factor", f"must be a power of two, got {self.factor}")

    def __init__(self, config: VQAutoencoder.Config) -> None:
        super().__init__(config)
        self._network: Autoencoder | None = None

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`."""
        small = {"base_channels": min(config.base_channels, 16), "batch_size": min(config.batch_size, 16)}
        return type(config)(**{**vars(config), **small, "steps": min(config.steps, 60)})

    @property
    def title(self) -> str:
        """See `ImageCodec.title`."""
        return f"vq_autoencoder of {self.config.codes} codes, {self.config.steps} steps, seed {self.config.seed}"

    def fit(self, images: Images, cache: Path | None = None) -> None:
        """See `ImageCodec.fit`; goes on from the newest checkpoint of an interrupted training.

        Raises:
            RunError: The loss is not finite.
        """
        network = self._build()
        if cache is None:
            self._train(network, images, None)
        else:
            folder = cache / f"vq_autoencoder-{self._key(images)}"
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):  # a second run waits for the first to train
                if not _loaded(network, folder):
                    unfinished = folder.with_name(f"{folder.name}-unfinished")
                    self._train(network, images, unfinished)
                    write_directory(folder, lambda path: save_tensors(path / "model.safetensors", network.state_dict()))
                    shutil.rmtree(unfinished, ignore_errors=True)
        self._set(network)

    def state(self) -> dict[str, Tensor]:
        """See `Codec.state`."""
        return dict(self._ready().state_dict())

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Codec.load_state`."""
        network = self._build()
        load_weights(network, state, "a saved tokenizer")
        self._set(network)

    def indices(self, images: Tensor) -> Tensor:
        """See `VectorQuantizer.indices`."""
        network = self._ready()
        return network.nearest(network.encode(images))

    def images(self, indices: Tensor) -> Tensor:
        """See `VectorQuantizer.images`."""
        network = self._ready()
        return network.decode(network.codes[indices])

    def _build(self) -> Autoencoder:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would also seed every accelerator, which fork_rng does not put back here.
            torch.default_generator.manual_seed(config.seed)
            return Autoencoder(
                config.channels,
                config.base_channels,
                config.factor.bit_length() - 1,
                config.blocks,
                config.codes,
                config.code_width,
            )

    def _train(self, network: Autoencoder, images: Images, folder: Path | None) -> None:
        config = self.config
        network.to(self.device).train().requires_grad_(True)
        optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, betas=(0.9, 0.99))
        averages = CodebookAverages(network.codes, config.decay, config.restart_below)
        first = 0 if folder is None else _restore(folder, network, optimizer, averages)
        steps = range(first, config.steps)
        for step in show_progress(steps, "training the tokenizer", total=config.steps, done=first):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _share(step, config.steps)
            loss = self._step(network, images, averages, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            done = step + 1
            if done % config.checkpoint_every == 0 or done == config.steps:
                if not math.isfinite(float(loss.detach())):
                    raise RunError(f"{self.title}: the loss is not finite at step {done}; lower learning_rate")
                if folder is not None and done < config.steps:
                    _save(folder, done, network, optimizer, averages)

    def _step(self, network: Autoencoder, images: Images, averages: CodebookAverages, step: int) -> Tensor:
        """Loss of one batch; the codebook has followed it when this returns."""
        config = self.config
        rows = Draws.for_range(config.seed, step, 0, config.batch_size).within("tokenizer")
        batch = images[rows.integers("rows", len(images))].to(self.device).float() / 255
        vectors = network.encode(batch)
        flat = vectors.detach().flatten(0, -2)
        replaced = Draws.for_range(config.seed, step, 0, config.codes).within("tokenizer").integers("code", len(flat))
        if step == 0:
            averages.start(flat[replaced.to(flat.device)])
        chosen = network.nearest(vectors.detach())
        quantized = network.codes[chosen]
        # Straight through: the decoder sees codes, the encoder the decoder's gradient.
        decoded = network.decode(vectors + (quantized - vectors).detach())
        loss = (decoded - batch).square().mean() + config.commitment * (vectors - quantized).square().mean()
        averages.update(flat, chosen.flatten())
        if step < (1 - _SETTLE) * config.steps:
            averages.restart(flat[replaced.to(flat.device)])
        return loss

    def _key(self, images: Images) -> str:
        config = {name: value for name, value in vars(self.config).items() if name not in _NOT_IN_KEY}
        digest = hashlib.sha256(json.dumps([config, len(images)], sort_keys=True).encode())
        seen = images[torch.linspace(0, len(images) - 1, min(len(images), _SEEN)).long()]
        digest.update(seen.numpy().tobytes())
        return digest.hexdigest()[:16]

    def _set(self, network: Autoencoder) -> None:
        self._network = network.to(self.device).eval().requires_grad_(False)
        self._fingerprint = ""

    def _ready(self) -> Autoencoder:
        if self._network is None:
            raise RunError(f"tokenizer {self.title} is not trained yet; prepare the data first")
        return self._network


def _share(step: int, steps: int) -> float:
    """Learning rate as a share of its peak: a short rise, then half a cosine."""
    warmup = min(100, steps // 10)
    return min(1.0, (step + 1) / (warmup + 1)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loaded(network: Autoencoder, folder: Path) -> bool:
    try:
        verify_directory(folder)
        load_weights(network, load_tensors(folder / "model.safetensors"), str(folder))
    except CheckpointError:
        return False  # never written, or damaged: trained again
    return True


def _save(
    folder: Path, step: int, network: Autoencoder, optimizer: torch.optim.Optimizer, averages: CodebookAverages
) -> None:
    tensors = {f"network/{name}": tensor for name, tensor in network.state_dict().items()}
    tensors |= {f"averages/{name}": tensor for name, tensor in averages.state().items()}
    tensors |= flatten_optimizer(optimizer, "optimizer")
    folder.mkdir(parents=True, exist_ok=True)
    prune(folder, 1, save_checkpoint(folder, step, tensors, {}))


def _restore(folder: Path, network: Autoencoder, optimizer: torch.optim.Optimizer, averages: CodebookAverages) -> int:
    """Go on from the newest whole checkpoint; returns its step, 0 where there is none."""
    for path, problem in load_newest(folder):
        if problem is None:
            tensors = load_tensors(path / "state.safetensors")
            load_weights(network, _under(tensors, "network/"), str(path))
            averages.load_state(_under(tensors, "averages/"))
            restore_optimizer(optimizer, tensors, "optimizer")
            return int(json.loads((path / "state.json").read_text(encoding="utf-8"))["step"])
    return 0


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
