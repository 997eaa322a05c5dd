"""Tokens on disk: written once, read through memory maps, believed only when whole."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from dmmd_core import RunError, TextCodec
from dmmd_core.checkpoint import load_tensors, save_tensors, verify_directory, write_directory

BATCH_DOCUMENTS = 512


def default_cache() -> Path:
    """``$DMMD_CACHE``, or ``dmmd`` in the user's cache directory."""
    if os.environ.get("DMMD_CACHE"):
        return Path(os.environ["DMMD_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dmmd"


@dataclass(frozen=True)
class TokenCache:
    """Tokens of two splits, each a memory-mapped array of whole sequences.

    Attributes:
        path: Its folder.
        splits: By split, tokens ``[sequences, length]`` of the smallest unsigned type that holds the vocabulary.
    """

    path: Path
    splits: Mapping[str, np.ndarray]


def open_cache(path: Path, codec: TextCodec, length: int) -> TokenCache:
    """Open a finished cache and give the codec the state it was written with.

    Raises:
        CheckpointError: A file is missing, cut short or changed.
    """
    verify_directory(path)
    facts = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    state = load_tensors(path / "codec.safetensors") if (path / "codec.safetensors").exists() else {}
    if state:
        codec.load_state(state)
    splits = {
        name: np.memmap(path / f"{name}.bin", dtype=facts["dtype"], mode="r", shape=(sequences, length))
        for name, sequences in facts["sequences"].items()
    }
    return TokenCache(path, splits)


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
    dtype = np.dtype(np.min_scalar_type(codec.vocab_size - 1)).name

    def fill(folder: Path) -> None:
        sequences = {}
        for name, source in documents.items():
            total = 0
            with (folder / f"{name}.bin").open("wb") as file:
                for batch in _batches(progress(source(), name)):
                    for tokens in codec.encode_texts(batch):
                        whole = np.append(tokens, codec.boundary) if boundary else tokens
                        file.write(whole.astype(dtype).tobytes())
                        total += len(whole)
                sequences[name] = total // length
                if not sequences[name]:
                    raise RunError(
                        f"data text: split {name!r} has {total} tokens, fewer than one sequence of {length}; give "
                        "more text, "
                        "a shorter length, or another held_out"
                    )
                file.truncate(sequences[name] * length * np.dtype(dtype).itemsize)
        (folder / "facts.json").write_text(
            json.dumps({"dtype": dtype, "sequences": sequences}) + "\n", encoding="utf-8"
        )
        if codec.state():
            save_tensors(folder / "codec.safetensors", codec.state())

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_directory(path, fill)
    except OSError as error:
        _clear_unfinished(path)
        raise RunError(
            f"data text: the token cache {path} cannot be written ({error.strerror or error}); free space, or set "
            "cache to a "
            "folder elsewhere. Nothing was lost: the same command starts it again"
        ) from error
    except BaseException:
        _clear_unfinished(path)
        raise


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    documents = iter(documents)
    while batch := list(islice(documents, BATCH_DOCUMENTS)):
        yield batch


def _clear_unfinished(path: Path) -> None:
    for left in path.parent.glob(f".*{path.name}"):
        shutil.rmtree(left, ignore_errors=True)
