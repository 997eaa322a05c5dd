"""Directories that are either whole or not there, and checkpoints in them.

A directory is written under a temporary name, every file synced and, but for a model card, listed with its SHA-256 in
``manifest.json``, then renamed. Only safetensors and JSON are written and read; nothing is unpickled.
What FSDP2 has sharded is written in shards, by all processes, and read by any number of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from torch.distributed.tensor import DTensor, distribute_tensor

from dmmd_core.distributed import Processes
from dmmd_core.errors import CheckpointError, RunError

MANIFEST = "manifest.json"
_FREE = ("README.md",)  # a model card may be edited, here or on the hub; nothing is read from it
_PREFIX = "step_"
TEMPORARY = ".incomplete-"
_SHARD = "shard-"  # as torch.distributed.checkpoint names its files


_REMEDY = (
    "what was there before is intact: make room, or see that the directory is writable, and run the same command "
    "to go on"
)


@contextmanager
def _told_if_it_cannot_be_written(subject: str, temporary: Path, remedy: str = _REMEDY) -> Iterator[None]:
    """Turn a full disk and the like into one error that names `subject`; what was written by then is removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise RunError(f"{subject} cannot be written ({reason}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old or the new content and nothing between.

    Raises:
        RunError: The disk is full or refuses; the old content is intact.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with _told_if_it_cannot_be_written(str(path), temporary):
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically, indented."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_directory(
    path: Path, fill: Callable[[Path], None], *, subject: str | None = None, remedy: str = _REMEDY
) -> None:
    """Create or replace a directory atomically.

    Args:
        path: The directory.
        fill: Writes the files into the directory that it is given.
        subject: What the error names; the path by default.
        remedy: What the error says to do.

    Raises:
        RunError: The disk is full or refuses; a directory that was there before is intact.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with _told_if_it_cannot_be_written(subject or str(path), temporary, remedy):
        _write_directory(path, temporary, fill)


def _write_directory(path: Path, temporary: Path, fill: Callable[[Path], None]) -> None:
    _begin(temporary, fill)
    _finish(path, temporary)


def _begin(temporary: Path, fill: Callable[[Path], None]) -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)


def _finish(path: Path, temporary: Path) -> None:
    """List, sync and rename what is complete."""
    files = sorted(file for file in temporary.iterdir() if file.is_file())
    manifest = {file.name: _sha256(file) for file in files if file.name not in _FREE}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for file in [*files, temporary / MANIFEST, temporary]:
        _sync(file)
    if path.exists():
        old = path.with_name(f"{TEMPORARY}old-{path.name}")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old)
    else:
        os.replace(temporary, path)
    _sync(path.parent)


def verify_directory(path: Path) -> None:
    """Check a directory against its manifest.

    Raises:
        CheckpointError: A file is missing or changed, or there is no manifest; names the file.
    """
    manifest_path = path / MANIFEST
    try:
        manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{manifest_path} is missing or damaged: {error}") from error
    for name, digest in manifest.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing, although {manifest_path} lists it")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged: its SHA-256 differs from the one in {manifest_path}")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own types for damage and OSError for the rest
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_weights(module: torch.nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Load a state dict strictly.

    Raises:
        CheckpointError: Names are missing or left over, or shapes differ; says which and where from.
    """
    try:
        module.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        details = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"the weights in {origin} do not fit {type(module).__name__}: {details}") from error


def save_checkpoint(
    directory: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    processes: Processes = Processes(),  # noqa: B008 - immutable
) -> Path:
    """Write the checkpoint of a step.

    What is whole goes into ``state.safetensors``, written by the first process; of what is sharded (FSDP2) every
    process writes its shards beside it, through `torch.distributed.checkpoint`.

    Args:
        directory: Directory of a stage's checkpoints, seen by all processes.
        step: Steps done.
        tensors: All tensors of the training state.
        state: Everything else, JSON-serialisable.
        processes: Those that call this together.

    Returns:
        The checkpoint's directory.

    Raises:
        RunError: The disk is full or refuses; the checkpoints that were there are intact.
    """
    sharded = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in sharded}

    def fill(path: Path) -> None:
        save_tensors(path / "state.safetensors", tensors)
        (path / "state.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")

    path = directory / f"{_PREFIX}{step:09d}"
    if not sharded:
        processes.from_main(lambda: write_directory(path, fill))
        return path
    temporary = path.with_name(f"{TEMPORARY}{path.name}")

    def guarded(work: Callable[[], None]) -> None:
        with _told_if_it_cannot_be_written(str(path), temporary):
            work()

    processes.from_main(lambda: guarded(lambda: _begin(temporary, fill)))
    try:
        save_shards(sharded, storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True))
    except CheckpointException as error:
        reason = "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
        raise processes.agreed(RunError(f"{path} cannot be written ({reason}); {_REMEDY}")) from error
    processes.from_main(lambda: guarded(lambda: _finish(path, temporary)))
    return path


def load_checkpoint(path: Path, like: Callable[[str], Tensor | None] = lambda name: None) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, however many processes wrote it.

    Args:
        path: A checkpoint that is whole.
        like: Where it gives a sharded tensor for a name, that one's shards are read; otherwise all of it, to the CPU.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    found = load_tensors(path / "state.safetensors")
    for name, tensor in found.items():
        model = like(name)
        if isinstance(model, DTensor):
            here = tensor.to(model.device)
            found[name] = distribute_tensor(here, model.device_mesh, model.placements, src_data_rank=None)
    if any(path.glob(f"{_SHARD}*")):
        found |= _load_shards(path, like, without=found)
    return found


def _load_shards(path: Path, like: Callable[[str], Tensor | None], without: Mapping[str, Tensor]) -> dict[str, Tensor]:
    reader = HuggingFaceStorageReader(str(path))
    wanted: dict[str, Any] = {}
    for name, known in reader.read_metadata().state_dict_metadata.items():
        if name not in without:
            model = like(name)
            assert isinstance(known, TensorStorageMetadata)
            if isinstance(model, DTensor):
                wanted[name] = torch.zeros_like(model.detach())
            else:
                wanted[name] = torch.zeros(known.size, dtype=known.properties.dtype)
    try:
        load_shards(wanted, storage_reader=reader, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return wanted


def checkpoints(directory: Path) -> list[Path]:
    """All complete-looking checkpoints, newest first; temporary names never count."""
    return sorted((p for p in directory.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def load_newest(directory: Path) -> Iterator[tuple[Path, CheckpointError | None]]:
    """Yield checkpoints from the newest on, each with what is wrong with it or None."""
    for path in checkpoints(directory):
        try:
            verify_directory(path)
        except CheckpointError as error:
            yield path, error
        else:
            yield path, None


def prune(directory: Path, keep: int, newest: Path) -> None:
    """Remove all but so many checkpoints up to `newest`, and all beyond it: a run went on from before those."""
    found = checkpoints(directory)
    place = found.index(newest)
    for path in found[:place] + found[place + keep :]:
        shutil.rmtree(path)


def clear_incomplete(directory: Path) -> None:
    """Remove what a process left behind that ended while it wrote."""
    for path in directory.glob(f"{TEMPORARY}*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def flatten_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """Name every tensor of an optimiser's state."""
    states = optimizer.state_dict()["state"]
    return {
        f"{prefix}/{index}/{name}": value if isinstance(value, Tensor) else torch.tensor(value)
        for index, state in states.items()
        for name, value in state.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Undo `flatten_optimizer`."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(f"{prefix}/"):
            index, key = name[len(prefix) + 1 :].split("/")
            states.setdefault(int(index), {})[key] = value
    content = optimizer.state_dict()
    optimizer.load_state_dict({"state": states, "param_groups": content["param_groups"]})


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
