"""Tokenizers without training: bytes, and the characters of a given alphabet."""

from __future__ import annotations

import hashlib
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from dmmd_core import FieldError, RunError, TextCodec, option

BOUNDARY_TEXT = "<|endoftext|>"
_UNKNOWN_TEXT = "\N{REPLACEMENT CHARACTER}"
_PRINTABLE = "\n" + string.ascii_letters + string.digits + string.punctuation + " "


class Bytes(TextCodec):
    """The 256 bytes of UTF-8, and a boundary."""

    def __init__(self, config: Bytes.Config) -> None:
        self.config = config
        self.vocab_size, self.boundary = 257, 256

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextCodec.encode_texts`."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint16) for text in texts]

    def decode(self, tokens: Tensor) -> list[str]:
        """See `TextCodec.decode`; bytes that are no UTF-8 become U+FFFD."""
        return [
            b"".join(bytes([token]) if token < 256 else BOUNDARY_TEXT.encode() for token in row).decode(
                "utf-8", errors="replace"
            )
            for row in tokens.tolist()
        ]

    def cache_key(self) -> str:
        """See `TextCodec.cache_key`."""
        return "byte"

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return "byte"


class Characters(TextCodec):
    """The characters of an alphabet, a symbol for all others, and a boundary."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        alphabet: str = option(_PRINTABLE, help="the characters, each once; printable ASCII and newline by default")
        unknown: Literal["replace", "error"] = option(
            "replace", help="a character outside the alphabet becomes the unknown symbol, or is refused"
        )

        def __post_init__(self) -> None:
            """Check the alphabet."""
            twice = [character for character, count in Counter(self.alphabet).items() if count > 1]
            if not self.alphabet or twice:
                raise FieldError("alphabet", f"must name characters, each once, got {twice or self.alphabet!r}")

    def __init__(self, config: Characters.Config) -> None:
        self.config = config
        self._unknown = len(config.alphabet)
        self.boundary = self._unknown + 1
        self.vocab_size = self._unknown + 2
        codes = np.array([ord(character) for character in config.alphabet])
        self._table = np.full(int(codes.max()) + 2, self._unknown, dtype=np.int32)
        self._table[codes] = np.arange(len(codes))
        self._texts = [*config.alphabet, _UNKNOWN_TEXT, BOUNDARY_TEXT]

    def encode_texts(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `TextCodec.encode_texts`.

        Raises:
            RunError: A character is not in the alphabet and ``unknown`` is ``error``.
        """
        rows = []
        for text in texts:
            codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
            tokens = self._table[np.minimum(codes, len(self._table) - 1)]
            if self.config.unknown == "error" and bool((tokens == self._unknown).any()):
                raise RunError(self._complaint(codes[tokens == self._unknown]))
            rows.append(tokens)
        return rows

    def decode(self, tokens: Tensor) -> list[str]:
        """See `TextCodec.decode`."""
        return ["".join(self._texts[token] for token in row) for row in tokens.tolist()]

    def cache_key(self) -> str:
        """See `TextCodec.cache_key`."""
        return f"char:{self.config.unknown}:{self.fingerprint()}"

    def fingerprint(self) -> str:
        """See `Codec.fingerprint`."""
        return hashlib.sha256(self.config.alphabet.encode("utf-8")).hexdigest()[:16]

    def _complaint(self, codes: np.ndarray) -> str:
        counts = Counter(chr(code) for code in codes.tolist()).most_common(10)
        listing = ", ".join(f"{character!r} ({count} times)" for character, count in counts)
        return (
            f"tokenizer char: the text has characters outside the alphabet: {listing}; add them to alphabet, or set "
            "unknown to replace"
        )
