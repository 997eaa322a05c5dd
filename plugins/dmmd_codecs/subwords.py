"""Tokenizers of the Hugging Face libraries: byte-pair encoding trained on the corpus, and ready ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dmmd_codecs.characters import BOUNDARY_TEXT
from dmmd_core import FieldError, RunError, TextCodec, hub_problem, option


class _LibraryCodec(TextCodec):
    """A `tokenizers.Tokenizer`, made or loaded in `fit` and kept as its JSON text."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._json = ""
        self._tokenizer: Any = None

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextCodec.encode_texts`; the library encodes in parallel."""
        encodings = self._ready().encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, tokens: Tensor) -> list[str]:
        """See `TextCodec.decode`."""
        return list(self._ready().decode_batch(tokens.tolist(), skip_special_tokens=False))

    def state(self) -> dict[str, Tensor]:
        """See `Codec.state`: the tokenizer's JSON as bytes."""
        self._ready()
        return {"tokenizer_json": torch.frombuffer(bytearray(self._json.encode("utf-8")), dtype=torch.uint8)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Codec.load_state`."""
        self._set(bytes(state["tokenizer_json"].numpy()).decode("utf-8"))

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        self._ready()
        content = json.dumps(json.loads(self._json), sort_keys=True)
        return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]

    def _set(self, text: str) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(text)
        # How a tokenizer was set to cut or pad has no place in a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._json = self._tokenizer.to_str()

    def _ready(self) -> Any:
        if self._tokenizer is None:
            raise RunError(f"the tokenizer {type(self).__name__} was neither fitted nor loaded; prepare the data first")
        return self._tokenizer


class BytePairs(_LibraryCodec):
    """Byte-level byte-pair encoding, trained on the training split with the `tokenizers` library."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        vocab_size: int = option(1024, help="number of tokens, the 256 bytes and the boundary among them", minimum=258)

    def __init__(self, config: BytePairs.Config) -> None:
        super().__init__(config.vocab_size)
        self.config = config
        self.boundary = 0

    def fit(self, documents: Iterable[str]) -> None:
        """See `TextCodec.fit`."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[BOUNDARY_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        if tokenizer.get_vocab_size() != self.vocab_size:
            raise RunError(
                f"tokenizer bpe: the training text gives {tokenizer.get_vocab_size()} tokens and no more, but "
                "vocab_size "
                f"is {self.vocab_size}; lower vocab_size, or give more text"
            )
        self._set(tokenizer.to_str())

    def cache_key(self) -> str:
        """See `TextCodec.cache_key`."""
        return f"bpe:{self.vocab_size}"


class Pretrained(_LibraryCodec):
    """A ready tokenizer: a ``tokenizer.json``, or whatever `transformers.AutoTokenizer` finds under a path or name."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        path: str = option(help="a tokenizer.json, a folder, or a name on the hub, for example gpt2")
        vocab_size: int = option(help="its number of tokens, so that sizes are known before it is loaded", minimum=2)
        boundary: str = option(BOUNDARY_TEXT, help="the token that ends a document")
        revision: str | None = option(None, help="revision on the hub")

    def __init__(self, config: Pretrained.Config) -> None:
        super().__init__(config.vocab_size)
        self.config = config
        self.boundary = -1

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a file that is not there before anything is built."""
        if config.path.endswith(".json") and not Path(config.path).is_file():
            raise FieldError("path", f"there is no file {config.path!r}")
        if Path(config.path).exists():
            return
        problem = hub_problem(config.path, "tokenizer_config.json", revision=config.revision)
        if problem:
            raise FieldError("path", problem)

    def fit(self, documents: Iterable[str]) -> None:
        """See `TextCodec.fit`; loads, and reads no documents."""
        self._set(self._load())

    def cache_key(self) -> str:
        """See `TextCodec.cache_key`."""
        path = Path(self.config.path)
        if not path.exists():
            return f"pretrained:{self.config.path}:{self.config.revision}:{self.config.boundary}"
        files = [path] if path.is_file() else sorted(file for file in path.iterdir() if "token" in file.name)
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
        return f"pretrained:{digest}:{self.config.boundary}"

    def _load(self) -> str:
        path = self.config.path
        try:
            if path.endswith(".json"):
                return Path(path).read_text(encoding="utf-8")
            from transformers import AutoTokenizer

            loaded = AutoTokenizer.from_pretrained(path, revision=self.config.revision, use_fast=True)
        except Exception as error:  # the library raises whatever its network and file layers raise
            raise RunError(
                f"tokenizer pretrained: {path!r} cannot be loaded ({type(error).__name__}: {_first_line(error)}); "
                "give a "
                "folder or tokenizer.json on this machine, or a name on the hub with the hub within reach"
            ) from error
        if not getattr(loaded, "is_fast", False):
            raise RunError(f"tokenizer pretrained: {path!r} has no fast form; convert it to a tokenizer.json")
        return str(loaded.backend_tokenizer.to_str())

    def _set(self, text: str) -> None:
        try:
            super()._set(text)
        except Exception as error:
            raise RunError(
                f"tokenizer pretrained: {self.config.path!r} is no tokenizer ({_first_line(error)})"
            ) from error
        size = self._tokenizer.get_vocab_size()
        if size != self.vocab_size:
            raise RunError(
                f"tokenizer pretrained: {self.config.path!r} has {size} tokens, but vocab_size is "
                f"{self.vocab_size}; set "
                f"vocab_size to {size}"
            )
        boundary = self._tokenizer.token_to_id(self.config.boundary)
        if boundary is None:
            raise RunError(
                f"tokenizer pretrained: {self.config.path!r} has no token {self.config.boundary!r}; set boundary "
                "to the "
                "token that ends its documents"
            )
        self.boundary = int(boundary)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
