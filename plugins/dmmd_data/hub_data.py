"""Data sets of the `datasets` library: on the hub, saved to disk, or read by a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmmd_core import FieldError, RunError, hub_problem


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the `datasets` library.

    Attributes:
        what: Who asks, the start of every message.
        name: Name on the hub, a folder (written by ``save_to_disk``, or one the library can read), or a loader such
            as ``json`` or ``parquet`` with `data_files`.
        config: Its configuration.
        data_files: Files for a loader.
        streaming: Read without downloading the whole.
    """

    what: str
    name: str
    config: str | None = None
    data_files: tuple[str, ...] = ()
    streaming: bool = False

    def load(self, split: str) -> Any:
        """Open a split.

        Raises:
            RunError: The data set cannot be loaded, or has no such split; says what there is.
        """
        import datasets

        try:
            if (Path(self.name) / "dataset_dict.json").is_file() or (Path(self.name) / "state.json").is_file():
                found = datasets.load_from_disk(self.name)
                if isinstance(found, datasets.Dataset):
                    found = {"train": found}
                if split not in found:
                    raise ValueError(f"no split {split!r}, it has {', '.join(map(repr, sorted(found)))}")
                return found[split].to_iterable_dataset() if self.streaming else found[split]
            files = list(self.data_files) or None
            return datasets.load_dataset(
                self.name, self.config, data_files=files, split=split, streaming=self.streaming
            )
        except Exception as error:  # the library raises whatever its network and file layers raise
            raise self.failure(split, error) from error

    def failure(self, split: str, error: Exception) -> RunError:
        """What went wrong with a split, as our own error."""
        reason = (str(error).splitlines() or [""])[0]
        return RunError(
            f"{self.what}: split {split!r} of data set {self.name!r} cannot be loaded ({type(error).__name__}: "
            f"{reason}); check name, config and split, and that the hub is within reach, or give local files instead"
        )

    def parts(self, split: str) -> list[Any]:
        """What decides the content of a split, without reading a hub: for a fingerprint."""
        parts: list[Any] = [self.name, self.config, split]
        path = Path(self.name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            parts += [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return [*parts, *(digest_of_file(Path(file)) if Path(file).is_file() else file for file in self.data_files)]


def refuse_missing_data(name: str, data_files: Sequence[str]) -> None:
    """Refuse files that are not there, and names that neither this machine nor the hub knows.

    A folder, a loader with files, and what the library has prepared here before need no network.

    Raises:
        FieldError: For the field ``data_files`` or ``dataset``.
    """
    for file in data_files:
        if "://" not in file and "*" not in file and not Path(file).exists():
            raise FieldError("data_files", f"there is no file {file!r}")
    if data_files or Path(name).exists():
        return
    from datasets import config

    if (Path(config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return
    problem = hub_problem(name, kind="dataset")
    if problem is not None:
        raise FieldError("dataset", f"{problem}; give a folder, or a loader with data_files")


def digest_of_file(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
