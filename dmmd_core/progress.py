"""Progress of work that is no stage of a run: a bar on a terminal or in a notebook, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_Item = TypeVar("_Item")
_LINE_EVERY_S = 15.0
QUIET = "DMMD_QUIET"  # environment variable of the command lines' --quiet


def in_notebook() -> bool:
    """Whether this is a notebook: a bar can be drawn there, although standard error is no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return any(cls.__name__ == "ZMQInteractiveShell" for cls in type(shell).__mro__)


def show_progress(
    items: Iterable[_Item],
    what: str,
    *,
    total: int | None = None,
    unit: str = "steps",
    per_item: int | Callable[[_Item], int] = 1,
    done: int = 0,
) -> Iterator[_Item]:
    """Pass items on and show on standard error how far they are, how fast, and when they will be done.

    With the environment variable ``DMMD_QUIET`` they are passed on in silence.

    Args:
        items: What is worked on; an item counts as done when the next one is asked for.
        what: What is being done, for example ``tokenising train``.
        total: Number of units in the end, or None where it is not known.
        unit: What is counted.
        per_item: Units per item, or what tells the units of an item.
        done: Units that were done before.
    """
    if os.environ.get(QUIET):
        yield from items
        return
    if sys.stderr.isatty() or in_notebook():
        from tqdm import tqdm

        bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", mininterval=1.0, leave=False)
        with bar:
            for item in items:
                yield item
                units = per_item(item) if callable(per_item) else per_item
                bar.update(min(units, total - bar.n) if total is not None else units)
        return
    started = last = time.monotonic()
    count = done
    for item in items:
        yield item
        count += per_item(item) if callable(per_item) else per_item
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S:
            last = now
            print(_line(what, unit, count, total, (count - done) / (now - started)), file=sys.stderr, flush=True)


def _line(what: str, unit: str, count: int, total: int | None, per_second: float) -> str:
    if total is None:
        return f"{what}: {count} {unit}  {per_second:.1f} {unit}/s"
    minutes, seconds = divmod(round(max(0, total - count) / per_second), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return f"{what}: {min(count, total)}/{total}  {per_second:.1f} {unit}/s  ETA {left}"
