"""How fast a stage goes, and when it will be done."""

from __future__ import annotations

from collections import deque

_WINDOW = 30


class Rate:
    """Speed over the latest reports of a stage, so that it follows a change and an estimate does not jump.

    Args:
        total: Steps of the stage.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self._reports: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def report(self, step: int, now_s: float) -> None:
        """Note that `step` steps, those of earlier runs included, were done at a time in seconds."""
        self._reports.append((step, now_s))

    @property
    def per_second(self) -> float | None:
        """Steps per second, or None before two reports."""
        if len(self._reports) < 2:
            return None
        (first, since), (last, until) = self._reports[0], self._reports[-1]
        return (last - first) / (until - since) if until > since and last > first else None

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the stage is done, or None where the speed is not known."""
        speed = self.per_second
        return None if speed is None else (self.total - self._reports[-1][0]) / speed


def rate_text(per_second: float | None) -> str:
    """Write a speed: ``12.3 it/s``, and ``4.2 s/it`` where one step takes longer than a second."""
    if per_second is None:
        return "- it/s"
    return f"{per_second:.1f} it/s" if per_second >= 1 else f"{1 / per_second:.1f} s/it"


def clock(seconds: float | None) -> str:
    """Write a time span: ``0:42`` or ``1:02:03``."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
