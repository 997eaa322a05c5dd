"""Pictures in a column of any data set of the `datasets` library."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dmmd_core import BadImageError, ImageSource, Picture, RunError, option
from dmmd_data.hub_data import HubData, refuse_missing_data
from dmmd_data.picture_files import decode_picture, hold_out, known_split

_WHAT = "images image_dataset"


class ImageDataset(ImageSource):
    """An image column, map style, with a label column where there are classes.

    Without a `test_split` a share of the rows is held out, chosen by their numbers alone.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        dataset: str = option(help="name on the hub, a folder, or a loader such as parquet or imagefolder")
        dataset_config: str | None = option(None, help="its configuration")
        data_files: list[str] = option([], help="files for a loader")
        image: str = option("image", help="its column that holds the images")
        label: str = option("label", help="its column that holds the class numbers, used with num_classes")
        num_classes: int | None = option(None, help="number of classes; null for no labels", minimum=1)
        train_split: str = option("train", help="its split for training")
        test_split: str | None = option(None, help="its test split; without it a part is held out")
        held_out: float = option(0.05, help="share held out where there is no test split", above=0, below=1)

    def __init__(self, config: ImageDataset.Config) -> None:
        self.config = config
        self.num_classes = config.num_classes
        self._splits: dict[str, Any] = {}
        self._rows: dict[str, np.ndarray] = {}
        self._digest = ""

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset() if config.num_classes is None else frozenset({"labels"})

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse files that are not there, and names that neither this machine nor the hub knows."""
        refuse_missing_data(config.dataset, config.data_files)

    def prepare(self) -> None:
        """See `ImageSource.prepare`."""
        config = self.config
        hub = HubData(
            what=_WHAT, name=config.dataset, config=config.dataset_config, data_files=tuple(config.data_files)
        )
        names = {"train": config.train_split}
        if config.test_split is not None:
            names["test"] = config.test_split
        parts: list[Any] = [config.image, config.label, config.num_classes, config.held_out]
        for split, name in names.items():
            found = hub.load(name)
            parts += [*hub.parts(name), len(found), sorted(getattr(found.info, "download_checksums", None) or ())]
            self._splits[split] = self._columns(found, name)
        self._digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        if config.test_split is None:
            size = len(self._splits["train"])
            self._rows = hold_out(range(size), config.held_out, _WHAT, f"split {config.train_split!r}")
            self._splits["test"] = self._splits["train"]
        else:
            self._rows = {split: np.arange(len(found)) for split, found in self._splits.items()}
        for split, rows in self._rows.items():
            if not len(rows):
                raise RunError(f"{_WHAT}: split {names.get(split, split)!r} of {config.dataset!r} is empty")

    def size(self, split: str) -> int:
        """See `ImageSource.size`."""
        known_split(self._rows, split)
        return len(self._rows[split])

    def read(self, split: str, index: int) -> Picture:
        """See `ImageSource.read`."""
        row = self._splits[split][int(self._rows[split][index])]
        content, origin = row[self.config.image], self.origin(split, index)
        if content is None or (content["bytes"] is None and content["path"] is None):
            raise BadImageError(f"{origin} has no image")
        image = decode_picture(content["bytes"] or Path(content["path"]), origin)
        if self.num_classes is None:
            return Picture(image, None)
        label = row[self.config.label]
        if isinstance(label, bool) or not isinstance(label, int):
            raise BadImageError(f"{origin} has the label {label!r}, which is no class number")
        return Picture(image, label)

    def origin(self, split: str, index: int) -> str:
        """See `ImageSource.origin`: data set, split and row."""
        name = self.config.test_split if split == "test" and self.config.test_split else self.config.train_split
        return f"row {int(self._rows[split][index])} of split {name!r} of {self.config.dataset!r}"

    def fingerprint(self) -> str:
        """See `ImageSource.fingerprint`."""
        return self._digest

    def _columns(self, found: Any, split: str) -> Any:
        """The columns that are read, the images still encoded, so that a damaged one can be told by its row."""
        import datasets

        config = self.config
        wanted = {"image": config.image} | ({} if config.num_classes is None else {"label": config.label})
        for field, column in wanted.items():
            if column not in found.column_names:
                raise RunError(
                    f"{_WHAT}: split {split!r} of {config.dataset!r} has no column {column!r}; it has "
                    f"{', '.join(sorted(found.column_names))}; set {field}"
                )
        kind = found.features[config.image]
        try:
            return found.select_columns(list(wanted.values())).cast_column(config.image, datasets.Image(decode=False))
        except (TypeError, ValueError, KeyError, NotImplementedError) as error:
            raise RunError(
                f"{_WHAT}: column {config.image!r} of {config.dataset!r} holds {type(kind).__name__} and no images; "
                "set image to the column that does"
            ) from error
