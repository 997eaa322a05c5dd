"""Where documents come from: files, a Hugging Face data set, or the text that every Python carries."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmmd_core import RunError
from dmmd_data.hub_data import HubData


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


@dataclass(frozen=True, kw_only=True)
class HubSource(HubData):
    """Texts of a data set of the `datasets` library.

    Attributes:
        column: The column that holds the text.
        limit: Most documents per split; 0 for all.
    """

    column: str
    limit: int

    def documents(self, split: str) -> Iterator[str]:
        """Texts of a split.

        Raises:
            RunError: The data set cannot be loaded, or has no such split or column; says what there is.
        """
        rows = self.load(split)
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
        rows = len(self.load(split))
        return min(rows, self.limit) if self.limit else rows

    def fingerprint(self, split: str) -> str:
        """Digest of what is read, without reading a hub."""
        parts = [*self.parts(split), self.column, self.limit]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _guarded(self, rows: Any, split: str) -> Iterator[Any]:
        """Rows, with what fails while they stream told as our own error."""
        iterator = iter(rows)
        while True:
            try:
                row = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                raise self.failure(split, error) from error
            yield row
