"""Image source: where pictures come from, one at a time, before they are cut to size or turned into tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dmmd_core.interfaces.component import Component

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One picture as it was found.

    Attributes:
        image: The decoded image, of any size and mode.
        label: Its class, or None without labels. Whether it is in range is for the reader to check.
    """

    image: Image
    label: int | None


class ImageSource(Component, ABC):
    """Pictures in two splits, ``train`` and ``test``, read by number; capability ``labels`` with classes.

    Construction reads nothing; `prepare` finds the pictures; `read` decodes one and may be called from many threads.

    Attributes:
        num_classes: Number of classes, known before anything is read; None without labels.
    """

    kind: ClassVar[str] = "image_source"
    num_classes: int | None = None

    @abstractmethod
    def prepare(self) -> None:
        """Find the pictures of both splits.

        Raises:
            RunError: They are not there, a split is empty, or the classes are not as many as was said.
        """

    @abstractmethod
    def size(self, split: str) -> int:
        """Number of pictures of a split; raises a `KeyError` for another name than ``train`` and ``test``."""

    @abstractmethod
    def read(self, split: str, index: int) -> Picture:
        """Decode one picture.

        Raises:
            BadImageError: It is damaged; the message begins with its `origin`.
        """

    @abstractmethod
    def origin(self, split: str, index: int) -> str:
        """Name of one picture in messages, its file where there is one."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal digest of which pictures there are and in which order, once prepared."""
