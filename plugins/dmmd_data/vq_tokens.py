"""Images of any source through a tokenizer with a codebook, tokenised once into a cache on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    RunError,
    Slot,
    option,
    slot,
)
from dmmd_data.permutation import epoch_rows
from dmmd_data.picture_files import known_split
from dmmd_data.picture_reader import PictureReader, ReadingConfig, TrainingPictures
from dmmd_data.token_cache import ArrayWriter, default_cache, make_or_open, open_arrays, smallest_type, write_arrays

_WHAT = "data vq_tokens"
_SPLITS = ("train", "test")
_SMOKE_TOKENIZER = {
    "codes": 64, "factor": 4, "height": 32, "width": 32, "channels": 3, "base_channels": 16, "code_width": 8,
    "steps": 120, "batch_size": 16, "learning_rate": 3e-3,
}  # fmt: skip


@dataclass(frozen=True)
class _Ingredient:
    """What a cache is made of: its name for people, and what decides."""

    title: str
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.title} ({self.fingerprint})".strip()


class VQTokens(Data):
    """Images as the tokens of a VQ tokenizer, with labels, in a memory-mapped cache; ImageNet fits in 700 MB.

    The cache is found again by the tokenizer's weights, the source and how it is read. Real images are read from the
    source again where a metric or a report asks for them.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ReadingConfig):
        """Parameters."""

        source: Slot = slot("image_source", help="where the images come from")
        tokenizer: Slot = slot("codec", "diffusers_vq", help="images to tokens: diffusers_vq, vq_autoencoder, ...")
        tokens: str | None = option(
            None, help="folder of a cache made before, to be used as it is; refused if made with another tokenizer"
        )
        judged: int = option(
            1000, help="most held-out images on which the tokenizer's reconstruction is measured", minimum=1
        )

    def __init__(self, config: VQTokens.Config, *, source: ImageSource, tokenizer: Codec) -> None:
        if not isinstance(tokenizer, ImageCodec):
            raise FieldError("tokenizer", f"must be a codec of images, got {type(tokenizer).__name__}")
        self.config = config
        self.source = source
        self.codec: ImageCodec = tokenizer
        self.reader = PictureReader(source, tokenizer, config, _WHAT)
        self.spec = DataSpec(tokenizer.vocab_size, tokenizer.length, tokenizer.grid, source.num_classes)
        self._arrays: dict[str, np.ndarray] = {}
        self._facts: dict[str, float] = {}

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"grid", "held_out"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a cache that is not there before anything is built."""
        if config.tokens is not None and not (Path(config.tokens) / "facts.json").is_file():
            raise FieldError("tokens", f"there is no token cache (facts.json) in {config.tokens!r}")

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: generated pictures, and a tokenizer that is trained on them."""
        size = {"height": _SMOKE_TOKENIZER["height"], "width": _SMOKE_TOKENIZER["width"]}
        return cls.Config(
            source=Slot(name="shapes", params={**size, "train": 600, "test": 200}),
            tokenizer=Slot(name="vq_autoencoder", params=dict(_SMOKE_TOKENIZER)),
            cache=config.cache,
        )

    def prepare(self) -> None:
        """See `Data.prepare`: load or train the tokenizer, then tokenise, or open what was tokenised before.

        Raises:
            RunError: The images are not there, one cannot be used, the cache cannot be written, or the one that was
                asked for was made with another tokenizer or from other images.
        """
        self.source.prepare()
        root = Path(self.config.cache) if self.config.cache else default_cache()
        self.codec.fit(TrainingPictures(self.reader), root)
        if self.config.tokens is not None:
            self._arrays, facts = self._opened(Path(self.config.tokens))
        else:
            content = json.dumps([made.fingerprint for made in self._made_of().values()])
            key = hashlib.sha256(content.encode()).hexdigest()[:16]
            self._arrays, facts = make_or_open(root / f"vq-{key}", self._opened, self._write, _WHAT)
        self._facts = facts["report"]

    def facts(self) -> dict[str, float]:
        """See `Data.facts`: the tokenizer's error on held-out images, how its codebook is used, what was skipped."""
        return dict(self._facts)

    def size(self, split: str) -> int:
        """See `Data.size`."""
        known_split([name for name in _SPLITS if f"{name}_tokens" in self._arrays], split)
        return len(self._arrays[f"{split}_tokens"])

    def take(self, split: str, indices: Tensor) -> Batch:
        """See `Data.take`."""
        self.size(split)
        rows = indices.numpy()
        tokens = torch.from_numpy(self._arrays[f"{split}_tokens"][rows].astype(np.int64))
        if self.source.num_classes is None:
            return Batch(tokens)
        return Batch(tokens, torch.from_numpy(self._arrays[f"{split}_labels"][rows].astype(np.int64)))

    def split(self, name: str) -> Batch:
        """See `Data.split`."""
        return self.take(name, torch.arange(self.size(name)))

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`; every epoch is a fresh permutation."""
        return self.take("train", epoch_rows(draws, self.size("train"))).to(draws.device)

    def originals(self, split: str) -> Tensor:
        """See `Data.originals`; read from the source again.

        Raises:
            RunError: They do not fit into memory.
        """
        return self.reader.all(split, self._rows(split, torch.arange(self.size(split))))

    def take_originals(self, split: str, indices: Tensor) -> Tensor:
        """See `Data.take_originals`; read from the source again."""
        return self.reader.some(split, self._rows(split, indices))

    def _rows(self, split: str, indices: Tensor) -> Tensor:
        return torch.from_numpy(self._arrays[f"{split}_rows"][indices.numpy()].astype(np.int64))

    def _made_of(self) -> dict[str, _Ingredient]:
        """What a cache is made of: equal ingredients make equal tokens."""
        reading = json.dumps([self.source.num_classes, *self.reader.key()])
        return {
            "tokenizer": _Ingredient(self.codec.title, self.codec.fingerprint()),
            "images": _Ingredient(type(self.source).__name__, self.source.fingerprint()),
            "classes, size and reading": _Ingredient("", reading),
        }

    def _opened(self, path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        arrays, facts = open_arrays(path)
        found = {name: _Ingredient(*ingredient) for name, ingredient in facts["made_of"].items()}
        other = [
            f"{name} {found.get(name)} instead of {wanted}"
            for name, wanted in self._made_of().items()
            if name not in found or found[name].fingerprint != wanted.fingerprint
        ]
        if other:
            raise RunError(
                f"{_WHAT}: the token cache {path} was made with {' and '.join(other)}; name the cache that fits, or "
                "remove it (and tokens, where set) to have one made"
            )
        return arrays, facts

    def _write(self, path: Path) -> None:
        dtype = smallest_type(self.codec.vocab_size)

        def fill(writer: ArrayWriter) -> Mapping[str, Any]:
            uses = torch.zeros(self.codec.vocab_size, dtype=torch.int64)
            for split in _SPLITS:
                for chunk in self.reader.chunks(split):
                    tokens = self.codec.encode(torch.from_numpy(chunk.images))
                    if split == "train":
                        uses += torch.bincount(tokens.flatten(), minlength=len(uses))
                    writer.append(f"{split}_tokens", tokens.numpy().astype(dtype))
                    writer.append(f"{split}_labels", chunk.labels.astype(np.int32))
                    writer.append(f"{split}_rows", chunk.rows)
            report = {**_codebook_use(uses), **self._reconstruction()}
            if self.config.bad_images == "skip":
                report |= {f"skipped_{split}_images": count for split, count in self.reader.skipped.items()}
            made_of = {name: [made.title, made.fingerprint] for name, made in self._made_of().items()}
            return {"made_of": made_of, "report": report}

        write_arrays(path, fill, _WHAT)

    def _reconstruction(self) -> dict[str, float]:
        """Mean squared error of held-out images through the tokenizer, pixels in [0, 1], and the PSNR it means."""
        size = self.source.size("test")
        rows = torch.linspace(0, size - 1, min(size, self.config.judged)).long()
        total = count = 0.0
        for part in rows.split(64):
            images = self.reader.some("test", part, replace=True)
            difference = self.codec.decode(self.codec.encode(images)).double() - images.double()
            total, count = total + float(difference.square().sum()) / 255**2, count + images.numel()
        error = total / count
        return {
            "tokenizer_mse": error,
            "tokenizer_psnr_db": 10 * math.log10(1 / max(error, 1e-12)),
            "tokenizer_judged_images": len(rows),
        }


def _codebook_use(uses: Tensor) -> dict[str, float]:
    """Share of the codes that the training images use, and the perplexity of how often."""
    shares = uses.double() / uses.sum()
    entropy = -torch.special.xlogy(shares, shares).sum()
    return {"codebook_used_share": float((uses > 0).double().mean()), "codebook_perplexity": float(entropy.exp())}
