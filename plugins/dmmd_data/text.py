"""Text of any source, through any tokenizer, packed into sequences."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    RunError,
    Slot,
    TextCodec,
    option,
    show_progress,
    slot,
)
from dmmd_data.held_out import is_held_out
from dmmd_data.hub_data import digest_of_file, refuse_missing_data
from dmmd_data.permutation import epoch_rows
from dmmd_data.text_sources import HubSource, embedded_documents, expand_files, file_documents
from dmmd_data.token_cache import TokenCache, default_cache, make_or_open, open_cache, write_cache

_FORMAT = 2  # part of every cache's key
_FEW_DOCUMENTS = 20
Documents = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class _Amount:
    """Documents or bytes that a split has, as far as is known beforehand."""

    total: float | None
    unit: Literal["documents", "bytes"]


class Text(Data):
    """Documents as packed sequences of tokens, tokenised once into a cache on disk.

    Without `files` and `dataset` the text is the language reference that every CPython carries.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        length: int = option(128, help="tokens per sequence", minimum=2)
        tokenizer: Slot = slot("codec", "char", help="text to tokens: byte, char, bpe or pretrained")
        boundary: bool = option(True, help="end every document with the tokenizer's boundary token")
        files: list[str] = option([], help="text files, or folders of .txt files, in UTF-8")
        validation_files: list[str] = option([], help="files of the test split; without them a part is held out")
        unit: Literal["file", "paragraph", "line"] = option("file", help="what a document is, for files")
        errors: Literal["strict", "replace"] = option("strict", help="bytes that are no UTF-8: refuse or replace")
        dataset: str | None = option(None, help="a data set of the datasets library: hub name, folder, or loader")
        dataset_config: str | None = option(None, help="its configuration")
        data_files: list[str] = option([], help="files for a loader such as json")
        column: str = option("text", help="its column that holds the text")
        train_split: str = option("train", help="its split for training")
        validation_split: str | None = option(None, help="its test split; without it a part is held out")
        streaming: bool = option(False, help="read the data set without downloading it whole")
        max_documents: int = option(0, help="most documents per split; 0 for all", minimum=0)
        held_out: float = option(0.05, help="share held out where no validation text is given", above=0, below=1)
        cache: str | None = option(None, help="folder of token caches; $DMMD_CACHE or the user's cache by default")

        def __post_init__(self) -> None:
            """Check sources against each other."""
            if self.files and self.dataset is not None:
                raise FieldError("files", "give either files or dataset")
            if self.validation_files and not self.files:
                raise FieldError("validation_files", "needs files, the training text")
            if self.validation_split is not None and self.dataset is None:
                raise FieldError("validation_split", "needs dataset")
            if self.data_files and self.dataset is None:
                raise FieldError("data_files", "needs dataset, the name of a loader such as json")

    def __init__(self, config: Text.Config, *, tokenizer: Codec) -> None:
        if not isinstance(tokenizer, TextCodec):
            raise FieldError("tokenizer", f"must be a tokenizer of text, got {type(tokenizer).__name__}")
        self.config = config
        self.codec: TextCodec = tokenizer
        self.spec = DataSpec(tokenizer.vocab_size, config.length)
        self._cache: TokenCache | None = None

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"held_out"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse paths that are not there before anything is built."""
        for field in ("files", "validation_files"):
            try:
                expand_files(getattr(config, field))
            except (FileNotFoundError, PermissionError) as error:
                raise FieldError(field, str(error)) from error
        if config.dataset is not None:
            refuse_missing_data(config.dataset, config.data_files)

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: the embedded text in bytes."""
        return cls.Config(length=min(config.length, 32), tokenizer=Slot(name="byte"), cache=config.cache)

    def prepare(self) -> None:
        """See `Data.prepare`: tokenise, or open what was tokenised before.

        Raises:
            RunError: The text cannot be read, or is too short, or the cache cannot be written.
        """

        def make(path: Path) -> None:
            documents = self._documents()
            self.codec.fit(documents["train"]())
            amounts = self._amounts()
            write_cache(
                path, self.codec, self.config.length, self.config.boundary, documents,
                lambda texts, split: _progress(texts, split, amounts[split]),
            )  # fmt: skip

        def opened(path: Path) -> TokenCache:
            return open_cache(path, self.codec, self.config.length)

        self._cache = make_or_open(self._cache_path(), opened, make, "data text")

    def size(self, split: str) -> int:
        """See `Data.size`."""
        return len(self._split(split))

    def take(self, split: str, indices: Tensor) -> Batch:
        """See `Data.take`."""
        return Batch(torch.from_numpy(self._split(split)[indices.numpy()].astype(np.int64)))

    def split(self, name: str) -> Batch:
        """See `Data.split`; for texts that fit into memory."""
        return Batch(torch.from_numpy(self._split(name).astype(np.int64)))

    def training_batch(self, draws: Draws) -> Batch:
        """See `Data.training_batch`; sample i of the run is item ``i mod n`` of epoch ``i // n``, permuted."""
        return self.take("train", epoch_rows(draws, self.size("train"))).to(draws.device)

    def _split(self, name: str) -> np.ndarray:
        splits = {} if self._cache is None else self._cache.splits
        if name not in splits:
            raise KeyError(f"no split {name!r}; there are {sorted(splits)} (was prepare() called?)")
        return splits[name]

    def _cache_path(self) -> Path:
        config = self.config
        sources: list[Any] = [_FORMAT, config.length, config.boundary, config.held_out, config.max_documents]
        sources += [self.codec.cache_key(), config.unit, config.errors]
        for files in (config.files, config.validation_files):
            sources.append([(path.name, digest_of_file(path)) for path in _expanded(files)])
        if config.dataset is not None:
            hub = self._hub(config.dataset)
            sources += [hub.fingerprint(split) for split in (config.train_split, config.validation_split or "")]
        if not config.files and config.dataset is None:
            sources.append(hashlib.sha256("\0".join(embedded_documents()).encode()).hexdigest())
        key = hashlib.sha256(repr(sources).encode()).hexdigest()[:16]
        return (Path(config.cache) if config.cache else default_cache()) / f"text-{key}"

    def _amounts(self) -> dict[str, _Amount]:
        """How much each split has to tokenise, for a bar with an ETA."""
        config = self.config
        shares = {"train": 1 - config.held_out, "test": config.held_out}
        if config.dataset is not None:
            hub, names = self._hub(config.dataset), {"train": config.train_split, "test": config.validation_split}
            if config.validation_split is None:
                rows = hub.count(config.train_split)
                return {name: _Amount(rows and rows * share, "documents") for name, share in shares.items()}
            return {name: _Amount(hub.count(split or ""), "documents") for name, split in names.items()}
        if not config.files:
            topics = len(embedded_documents())
            return {name: _Amount(topics * share, "documents") for name, share in shares.items()}
        sizes = {
            name: sum(path.stat().st_size for path in _expanded(files))
            for name, files in (("train", config.files), ("test", config.validation_files))
        }
        if config.max_documents:
            return dict.fromkeys(shares, _Amount(None, "bytes"))
        if sizes["test"]:
            return {name: _Amount(size, "bytes") for name, size in sizes.items()}
        return {name: _Amount(sizes["train"] * share, "bytes") for name, share in shares.items()}

    def _hub(self, name: str) -> HubSource:
        config = self.config
        return HubSource(
            what="data text",
            name=name,
            config=config.dataset_config,
            data_files=tuple(config.data_files),
            streaming=config.streaming,
            column=config.column,
            limit=config.max_documents,
        )

    def _documents(self) -> dict[str, Documents]:
        """A function per split that gives its documents; reading happens when it is called."""
        config = self.config
        if config.dataset is not None:
            hub = self._hub(config.dataset)

            def train() -> Iterator[str]:
                return hub.documents(config.train_split)

            if config.validation_split is not None:
                validation = config.validation_split
                return {"train": train, "test": lambda: hub.documents(validation)}
            return _hold_out(train, config.held_out)
        if not config.files:
            return _hold_out(lambda: iter(embedded_documents()), config.held_out)
        files, held = _expanded(config.files), _expanded(config.validation_files)

        def read(paths: Sequence[Path]) -> Documents:
            def documents() -> Iterator[str]:
                for place, text in enumerate(file_documents(paths, config.unit, config.errors)):
                    if config.max_documents and place >= config.max_documents:
                        return
                    yield text

            return documents

        return {"train": read(files), "test": read(held)} if held else _hold_out(read(files), config.held_out)


def _expanded(paths: Sequence[str]) -> list[Path]:
    try:
        return expand_files(paths)
    except (FileNotFoundError, PermissionError) as error:
        raise RunError(f"data text: {error}") from error


def _hold_out(source: Documents, share: float) -> dict[str, Documents]:
    """Hold out whole documents, chosen by their number; of fewer than twenty documents the end of each."""
    count = sum(1 for _, _ in zip(source(), range(_FEW_DOCUMENTS), strict=False))

    def part(held: bool) -> Documents:
        def documents() -> Iterator[str]:
            for place, text in enumerate(source()):
                if count < _FEW_DOCUMENTS:
                    cut = round(len(text) * (1 - share))
                    yield text[cut:] if held else text[:cut]
                elif held == is_held_out(place, share):
                    yield text

        return documents

    return {"train": part(held=False), "test": part(held=True)}


def _progress(documents: Iterator[str], split: str, amount: _Amount) -> Iterator[str]:
    """Show how much is tokenised, how fast, and how long the rest will take."""
    size = _bytes_of if amount.unit == "bytes" else 1
    total = None if amount.total is None else round(amount.total)
    return show_progress(documents, f"tokenising {split}", total=total, unit=amount.unit, per_item=size)


def _bytes_of(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
