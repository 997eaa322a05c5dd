"""Pictures in folders, with the classes as subfolders: the layout in which ImageNet is kept."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmmd_core import FieldError, ImageSource, Picture, RunError, option
from dmmd_data.picture_files import SUFFIXES, decode_picture, hold_out, known_split

_WHAT = "images image_folder"
_NAMES_SHOWN = 5


class ImageFolder(ImageSource):
    """All images below a folder; with `num_classes` the folders directly below it are the classes, sorted by name.

    Without a `test` folder a share of the images is held out, chosen by their path below `train` alone: images that
    come later move none from one split to the other.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        train: str = option(help="folder of the training images; its subfolders are the classes, if there are any")
        test: str | None = option(None, help="folder of the test images; without it a part is held out")
        num_classes: int | None = option(None, help="number of classes (subfolders); null for no labels", minimum=1)
        held_out: float = option(0.05, help="share held out where there is no test folder", above=0, below=1)

    def __init__(self, config: ImageFolder.Config) -> None:
        self.config = config
        self.num_classes = config.num_classes
        self._files: dict[str, list[str]] = {}
        self._labels: dict[str, list[int]] = {}
        self._digest = ""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset() if config.num_classes is None else frozenset({"labels"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse folders that are not there before anything is built."""
        layout = "one subfolder per class with the images in it" if config.num_classes else "images"
        given = {"train": config.train, "test": config.test}
        missing = {field: folder for field, folder in given.items() if folder and not Path(folder).is_dir()}
        if missing:
            folders = " and no folder ".join(map(repr, missing.values()))
            raise FieldError(
                next(iter(missing)), f"there is no folder {folders}; set {' and '.join(missing)} to what holds {layout}"
            )

    def prepare(self) -> None:
        """See `ImageSource.prepare`."""
        found = {"train": _listing(self.config.train)}
        if self.config.test is not None:
            found["test"] = _listing(self.config.test)
        digest = hashlib.sha256(repr((self.config.num_classes, self.config.held_out, sorted(found))).encode())
        for files in found.values():
            digest.update(repr([(name, status.st_size, status.st_mtime_ns) for name, status in files]).encode())
        self._digest = digest.hexdigest()[:16]
        names = {split: [name for name, _ in files] for split, files in found.items()}
        classes = self._classes(names["train"])
        if self.config.test is None:
            rows = hold_out(names["train"], self.config.held_out, _WHAT, self.config.train)
            names = {split: [names["train"][row] for row in chosen] for split, chosen in rows.items()}
        self._files = names
        if classes is not None:
            self._labels = {split: [self._label(name, classes) for name in files] for split, files in names.items()}

    def size(self, split: str) -> int:
        """See `ImageSource.size`."""
        known_split(self._files, split)
        return len(self._files[split])

    def read(self, split: str, index: int) -> Picture:
        """See `ImageSource.read`."""
        file = self.origin(split, index)
        label = self._labels[split][index] if self._labels else None
        return Picture(decode_picture(Path(file), file), label)

    def origin(self, split: str, index: int) -> str:
        """See `ImageSource.origin`: the file."""
        folder = self.config.test if split == "test" and self.config.test is not None else self.config.train
        return os.path.join(folder, self._files[split][index])

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`: names, sizes and times of all files."""
        return self._digest

    def _classes(self, names: list[str]) -> dict[str, int] | None:
        if self.num_classes is None:
            return None
        found = sorted({_class_of(name) for name in names if os.sep in name})
        loose = [name for name in names if os.sep not in name]
        if loose:
            raise RunError(
                f"{_WHAT}: {os.path.join(self.config.train, loose[0])} lies in no class folder, but num_classes is "
                f"{self.num_classes}; move it, or set num_classes to null"
            )
        if len(found) != self.num_classes:
            some = ", ".join(found[:_NAMES_SHOWN]) + (", ..." if len(found) > _NAMES_SHOWN else "")
            raise RunError(
                f"{_WHAT}: {self.config.train} has images in {len(found)} class folders ({some}), but num_classes is "
                f"{self.num_classes}; set num_classes to {len(found)}, or complete the folders"
            )
        return {name: number for number, name in enumerate(found)}

    def _label(self, name: str, classes: dict[str, int]) -> int:
        folder = _class_of(name)
        if folder not in classes:
            raise RunError(
                f"{_WHAT}: {os.path.join(str(self.config.test), name)} is of class {folder!r}, which "
                f"{self.config.train} does not have; name the class folders of both alike"
            )
        return classes[folder]


def _listing(folder: str) -> list[tuple[str, os.stat_result]]:
    """All images below a folder, by their sorted paths relative to it."""
    found = []
    try:
        for below, folders, files in os.walk(folder, onerror=_fail, followlinks=True):
            folders.sort()
            for file in files:
                if os.path.splitext(file)[1].lower() in SUFFIXES:
                    path = os.path.join(below, file)
                    found.append((os.path.relpath(path, folder), os.stat(path)))
    except OSError as error:
        raise RunError(f"{_WHAT}: {error.filename} cannot be read ({error.strerror}); check path and rights") from error
    if not found:
        kinds = ", ".join(sorted(SUFFIXES))
        raise RunError(f"{_WHAT}: there is no image ({kinds}) below {folder}; set train and test to where they are")
    return sorted(found)


def _fail(error: OSError) -> None:
    raise error


def _class_of(name: str) -> str:
    return name.split(os.sep, 1)[0]
