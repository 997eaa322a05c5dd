"""Where documents come from: files, a Hugging Face data set, or the text that every Python carries."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmmd_core import RunError, hub_problem


def embedded_documents() -> list[str]:
    """The language reference in CPython's ``pydoc_data.topics``, every topic once, in order of its name."""
    from pydoc_data.topics import topics

    return list(dict.fromkeys(topics[name] for name in sorted(topics)))


def expand_files(paths: Sequence[str]) -> list[Path]:
    """Files as they are, folders as all ``.txt`` files below them.

    Raises:
        FileNotFoundError: A path is not there, or a folder has no such file; the message says which.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            below = sorted(path.rglob("*.txt"))
            if not below:
                raise FileNotFoundError(f"the folder {path} has no .txt file")
            files += below
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    return files


def file_documents(files: Sequence[Path], unit: str, errors: str) -> Iterator[str]:
    """Documents of text files.

    Args:
        files: The files, UTF-8.
        unit: ``file``, ``paragraph`` (between blank lines) or ``line``.
        errors: ``strict``, or ``replace`` for bytes that are no UTF-8.

    Raises:
        RunError: A file cannot be read or decoded; names the file and the byte.
    """
    for file in files:
        try:
            if unit == "line":
                yield from _lines(file, errors)
                continue
            text = _decode(file.read_bytes(), file, 0, errors)
        except OSError as error:
            raise RunError(
                f"data text: {file} cannot be read ({error.strerror}); check the path and its rights"
            ) from error
        if unit == "file":
            yield text
        else:
            yield from (part for part in re.split(r"\n[ \t]*\n\s*", text) if part.strip())


def _lines(file: Path, errors: str) -> Iterator[str]:
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            text = _decode(line, file, offset, errors).rstrip("\r\n")
            offset += len(line)
            if text:
                yield text


def _decode(content: bytes, file: Path, offset: int, errors: str) -> str:
    try:
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise RunError(
            f"data text: {file} is no UTF-8 at byte {offset + error.start} ({content[error.start]:#04x}); convert "
            "the file, "
            "or set errors to replace"
        ) from error


@dataclass(frozen=True)
class HubSource:
    """A data set of the `datasets` library.

    Attributes:
        name: Name on the hub, a folder written by ``save_to_disk``, or a loader such as ``json`` with `data_files`.
        config: Its configuration.
        data_files: Files for a loader.
        column: The column that holds the text.
        streaming: Read without downloading the whole.
        limit: Most documents per split; 0 for all.
    """

    name: str
    config: str | None
    data_files: tuple[str, ...]
    column: str
    streaming: bool
    limit: int

    def documents(self, split: str) -> Iterator[str]:
        """Texts of a split.

        Raises:
            RunError: The data set cannot be loaded, or has no such split or column; says what there is.
        """
        rows = self._load(split)
        for place, row in enumerate(self._guarded(rows, split)):
            if self.limit and place >= self.limit:
                return
            if self.column not in row:
                raise RunError(
                    f"data text: {self.name!r} has no column {self.column!r}; it has {', '.join(sorted(row))}; "
                    "set column"
                )
            if not isinstance(row[self.column], str):
                raise RunError(
                    f"data text: column {self.column!r} of {self.name!r} holds {type(row[self.column]).__name__}, "
                    "not text"
                )
            yield row[self.column]

    def count(self, split: str) -> int | None:
        """Number of documents of a split, or None where only reading would tell."""
        if self.streaming:
            return self.limit or None
        rows = len(self._load(split))
        return min(rows, self.limit) if self.limit else rows

    def fingerprint(self, split: str) -> str:
        """Digest of what is read, without reading a hub."""
        parts = [self.name, self.config, split, self.column, self.limit]
        path = Path(self.name)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            parts += [(str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        parts += [digest_of_file(Path(file)) if Path(file).is_file() else file for file in self.data_files]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _load(self, split: str) -> Any:
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
            raise self._failure(split, error) from error

    def _guarded(self, rows: Any, split: str) -> Iterator[Any]:
        """Rows, with what fails while they stream told as our own error."""
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise self._failure(split, error) from error
            yield row

    def _failure(self, split: str, error: Exception) -> RunError:
        reason = (str(error).splitlines() or [""])[0]
        return RunError(
            f"data text: split {split!r} of data set {self.name!r} cannot be loaded ({type(error).__name__}: "
            f"{reason}); "
            "check name, config and split, and that the hub is within reach, or give local files instead"
        )


def dataset_problem(name: str) -> str | None:
    """Say why a data set cannot be loaded, or return None; a folder and a cached data set need no network."""
    if Path(name).exists():
        return None
    import datasets

    if (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).is_dir():
        return None
    return hub_problem(name, kind="dataset")


def digest_of_file(path: Path) -> str:
    """Digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
