"""Arrays on disk: written once, read through memory maps, believed only when whole; and the tokens of texts in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from dmmd_core import CheckpointError, RunError, TextCodec
from dmmd_core.checkpoint import load_tensors, save_tensors, verify_directory, write_directory

BATCH_DOCUMENTS = 512
_Opened = TypeVar("_Opened")


def default_cache() -> Path:
    """``$DMMD_CACHE``, or ``dmmd`` in the user's cache directory."""
    if os.environ.get("DMMD_CACHE"):
        return Path(os.environ["DMMD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmmd"


def make_or_open(path: Path, opened: Callable[[Path], _Opened], make: Callable[[Path], None], what: str) -> _Opened:
    """Open a cache; where there is none, or a damaged one, make it first. A second process waits for the first.

    Args:
        path: The cache's folder.
        opened: Opens it; raises a `CheckpointError`, `KeyError`, `ValueError` or `OSError` where it is damaged.
        make: Makes it, whole or not at all.
        what: Who asks, the start of every message.

    Raises:
        RunError: The folder around it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"{what}: the cache folder {path.parent} cannot be made ({error.strerror}); set cache"
        ) from error
    with FileLock(f"{path}.lock"):
        if path.exists():
            try:
                return opened(path)
            except (CheckpointError, KeyError, ValueError, OSError):
                shutil.rmtree(path, ignore_errors=True)  # damaged: made again, never half used
        make(path)
        return opened(path)


class ArrayWriter:
    """Appends rows to arrays in a folder.

    Args:
        folder: Gets a file ``NAME.bin`` per array, and ``facts.json`` in the end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, dict[str, Any]] = {}

    def append(self, name: str, rows: np.ndarray) -> None:
        """Append rows ``[n, ...]`` of always the same type and row shape."""
        entry = self._arrays.setdefault(name, {"dtype": rows.dtype.name, "shape": [0, *rows.shape[1:]]})
        assert (entry["dtype"], entry["shape"][1:]) == (rows.dtype.name, list(rows.shape[1:]))
        with (self.folder / f"{name}.bin").open("ab") as file:
            file.write(np.ascontiguousarray(rows).tobytes())
        entry["shape"][0] += len(rows)

    def rows(self, name: str) -> int:
        """Number of rows so far."""
        return int(self._arrays[name]["shape"][0]) if name in self._arrays else 0

    def truncate(self, name: str, rows: int) -> None:
        """Drop the rows from a number on."""
        entry = self._arrays[name]
        entry["shape"][0] = rows
        width = np.dtype(entry["dtype"]).itemsize * int(np.prod(entry["shape"][1:], dtype=np.int64))
        os.truncate(self.folder / f"{name}.bin", rows * width)

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the arrays' types and shapes beside further facts."""
        content = {"arrays": self._arrays, **facts}
        (self.folder / "facts.json").write_text(json.dumps(content) + "\n", encoding="utf-8")


def write_arrays(path: Path, fill: Callable[[ArrayWriter], Mapping[str, Any]], what: str) -> None:
    """Write a cache of arrays, atomically.

    Args:
        path: Its folder.
        fill: Appends everything, and returns further facts for ``facts.json``.
        what: Who asks, the start of every message.

    Raises:
        RunError: The disk is full or read-only; nothing is left behind then.
    """

    def work(folder: Path) -> None:
        writer = ArrayWriter(folder)
        writer.finish(fill(writer))

    try:
        write_directory(
            path,
            work,
            subject=f"{what}: the cache {path}",
            remedy="free space, or set cache to a folder elsewhere. Nothing was lost: the same command starts it again",
        )
    except BaseException:
        _clear_unfinished(path)
        raise


def open_arrays(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Open a cache of arrays: memory maps by name, and its facts.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    verify_directory(path)
    facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    arrays: dict[str, np.ndarray] = {
        name: np.memmap(path / f"{name}.bin", dtype=entry["dtype"], mode="r", shape=tuple(entry["shape"]))
        for name, entry in facts.pop("arrays").items()
    }
    return arrays, facts


def smallest_type(vocab_size: int) -> str:
    """Name of the smallest unsigned type that holds the tokens of a vocabulary."""
    return np.dtype(np.min_scalar_type(vocab_size - 1)).name


@dataclass(frozen=True)
class TokenCache:
    """Tokens of two splits of a text, each a memory-mapped array of whole sequences.

    Attributes:
        path: Its folder.
        splits: By split, tokens ``[sequences, length]`` of the smallest unsigned type that holds the vocabulary.
    """

    path: Path
    splits: Mapping[str, np.ndarray]


def open_cache(path: Path, codec: TextCodec, length: int) -> TokenCache:
    """Open a finished cache of a text and give the codec the state it was written with.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    arrays, _ = open_arrays(path)
    state = load_tensors(path / "codec.safetensors") if (path / "codec.safetensors").exists() else {}
    if state:
        codec.load_state(state)
    return TokenCache(path, {name: tokens.reshape(-1, length) for name, tokens in arrays.items()})


def write_cache(
    path: Path,
    codec: TextCodec,
    length: int,
    boundary: bool,
    documents: Mapping[str, Callable[[], Iterator[str]]],
    progress: Callable[[Iterator[str], str], Iterator[str]],
) -> None:
    """Tokenise the documents of every split into a cache, atomically.

    Args:
        path: Where the cache will be.
        codec: A fitted tokenizer.
        length: Tokens per sequence; what is left of the last one is dropped.
        boundary: Whether a boundary token follows every document.
        documents: By split, a function that gives the documents.
        progress: Wraps the documents of a split to show how far it is.

    Raises:
        RunError: A split is shorter than one sequence, or the disk is full; nothing is left behind then.
    """
    dtype = smallest_type(codec.vocab_size)

    def fill(writer: ArrayWriter) -> dict[str, Any]:
        for name, source in documents.items():
            for batch in _batches(progress(source(), name)):
                rows = [
                    np.append(tokens, codec.boundary) if boundary else tokens for tokens in codec.encode_texts(batch)
                ]
                writer.append(name, np.concatenate(rows).astype(dtype))
            sequences = writer.rows(name) // length
            if not sequences:
                raise RunError(
                    f"data text: split {name!r} has {writer.rows(name)} tokens, fewer than one sequence of {length}; "
                    "give more text, a shorter length, or another held_out"
                )
            writer.truncate(name, sequences * length)
        if codec.state():
            save_tensors(writer.folder / "codec.safetensors", codec.state())
        return {}

    write_arrays(path, fill, "data text")


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        yield batch


def _clear_unfinished(path: Path) -> None:
    for left in path.parent.glob(f".*{path.name}"):
        shutil.rmtree(left, ignore_errors=True)
