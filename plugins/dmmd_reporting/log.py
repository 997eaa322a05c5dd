"""``log.jsonl``: one JSON object a line, appended and flushed at once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmmd_core import RunError

if TYPE_CHECKING:
    from dmmd_core import Run

_SHARE = "_time_share"


class Log:
    """An append-only log.

    Args:
        path: The file; created on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def start(self, run: Run) -> None:
        """Append what is about to run: device, precision, sizes, choices (all of the engine's too) and versions."""
        versions = json.loads((run.directory / "plugins.json").read_text(encoding="utf-8"))
        self.write(
            "start",
            name=run.plan.recipe.name,
            device=str(run.device),
            precision=str(run.precision).removeprefix("torch."),
            choices=dict(run.choices),
            engine=dict(run.engine),
            sizes=dict(run.sizes),
            versions=versions["packages"],
        )

    def write(self, event: str, **content: Any) -> None:
        """Append one event with the time in seconds since the epoch; numbers that are not finite become text.

        Raises:
            RunError: The disk is full or refuses.
        """
        entry = _finite({"time": round(time.time(), 3), "event": event, **content})
        try:
            if self._file is None:
                # A line cut short by a crash must not swallow the next one.
                torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
                self._file = self.path.open("a", encoding="utf-8")
                if torn and self.path.stat().st_size:
                    self._file.write("\n")
            self._file.write(json.dumps(entry, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written ({error.strerror}); finished work is safe: make room, and run the same "
                "command to go on"
            ) from error

    def close(self) -> None:
        """Close the file; a last line that a full disk refuses has been told of."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the events of a log; lines cut short by a crash are passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            yield event


def loss_curves(path: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Collect training metrics: stage, metric, step to value; a step logged twice counts once, the later time."""
    curves: dict[str, dict[str, dict[int, float]]] = {}
    for event in read_log(path):
        if event.get("event") != "step" or event.get("stage") == "evaluate":
            continue
        try:
            step, stage = int(event["step"]), str(event["stage"])
            values = {str(name): float(value) for name, value in event["metrics"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            continue  # damaged, and still JSON
        for name, value in values.items():
            curves.setdefault(stage, {}).setdefault(name, {})[step] = value
    return curves


def time_shares(curves: Mapping[str, Mapping[str, Mapping[int, float]]]) -> dict[str, dict[str, float]]:
    """Where the time of every training stage went: part to share, the rest last, with a sum of 1.

    Args:
        curves: What `loss_curves` collected.
    """
    found = {}
    for stage, metrics in curves.items():
        seconds: dict[int, float] = {}  # by step of the log line, but for the batch size
        before = 0
        for step, speed in sorted(metrics.get("samples_per_second", {}).items()):
            seconds[step], before = (step - before) / max(speed, 1e-9), step
        parts = {}
        for name, curve in metrics.items():
            if name.endswith(_SHARE):
                # A part that a line does not name had no time in it.
                spent = sum(seconds.get(step, 0.0) * share for step, share in curve.items())
                parts[name.removesuffix(_SHARE).replace("_", " ")] = spent / max(sum(seconds.values()), 1e-9)
        if parts:
            found[stage] = {**parts, "rest": max(0.0, 1.0 - sum(parts.values()))}
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
