"""``--profile``: traces of a few training steps of every stage and of one sampling call, for people to look into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dmmd_core.checkpoint import write_text

FOLDER = "profile"
_WAIT, _WARMUP, _STEPS = 5, 2, 3  # steps that are passed over, that the profiler warms up in, that are traced
_ROWS = 10


class Profiler:
    """Writes a trace (Chrome's JSON, which Perfetto reads) and a table of the dearest operators for each piece of work.

    Args:
        folder: Where they are written.
        device: Where the run computes.
        say: Told where they are.

    Attributes:
        traced: Names of the pieces of work that have been traced.
    """

    def __init__(self, folder: Path, device: torch.device, say: Callable[[str], None]) -> None:
        self.folder = folder
        self.traced: list[str] = []
        self._say = say
        self._cuda = device.type == "cuda"

    @contextmanager
    def steps(self, name: str, remaining: int) -> Iterator[Callable[[], None]]:
        """Context of a stage's training; yields what must be called after every step.

        Args:
            name: Of the stage.
            remaining: Steps that it will make; where they are few, all the passing over and warming up is left out.
        """
        if remaining < 1:
            yield lambda: None
            return
        profile = self._profile(schedule=_schedule(remaining), on_trace_ready=lambda found: self._write(name, found))
        profile.start()
        try:
            yield profile.step
        finally:
            profile.stop()

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """Context of one call."""
        with self._profile() as profile:
            yield
        self._write(name, profile)

    def finish(self) -> None:
        """Say so where there was nothing to trace."""
        if not self.traced:
            self._say(
                "profile: nothing was traced, since every stage was finished before; give another run.directory=..."
            )

    def _profile(self, **more: Any) -> torch.profiler.profile:
        kinds = torch.profiler.ProfilerActivity
        activities = [kinds.CPU, kinds.CUDA] if self._cuda else [kinds.CPU]
        return torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True, **more)

    def _write(self, name: str, profile: torch.profiler.profile) -> None:
        self.folder.mkdir(exist_ok=True)
        trace, table = self.folder / f"{name}.trace.json", self.folder / f"{name}.txt"
        profile.export_chrome_trace(str(trace))
        write_text(table, _dearest(name, profile, "cuda" if self._cuda else "cpu"))
        self.traced.append(name)
        self._say(f"profile: {trace} (for https://ui.perfetto.dev) and {table}")


def _dearest(name: str, profile: torch.profiler.profile, device: str) -> str:
    """Table of the operators with the most time of their own on a device; labels of steps and parts are none."""
    time = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    operators = [
        (getattr(event, time), event.count, event.key)
        for event in profile.key_averages()
        # On CUDA a kernel stands beside the operator that launched it, and its time is the operator's.
        if not event.is_user_annotation and event.device_type.name == "CPU"
    ]
    total = sum(spent for spent, _, _ in operators)
    head = f"{name}: the {_ROWS} dearest operators, by time of their own on {device}, of {total / 1000:.2f} ms"
    rows = [f"{'ms':>12} {'share':>7} {'calls':>8}  operator"]
    for spent, calls, operator in sorted(operators, reverse=True)[:_ROWS]:
        rows.append(f"{spent / 1000:12.3f} {spent / max(total, 1e-9):7.1%} {calls:8d}  {operator}")
    return "\n".join([head, "", *rows]) + "\n"


def _schedule(remaining: int) -> Callable[[int], torch.profiler.ProfilerAction]:
    """What to do in a step, counted from 0 (torch's own schedule insists on a warm-up)."""
    action = torch.profiler.ProfilerAction
    steps = min(_STEPS, remaining)
    warmup = min(_WARMUP, remaining - steps)
    first = min(_WAIT, remaining - steps - warmup) + warmup

    def decide(step: int) -> torch.profiler.ProfilerAction:
        if step >= first + steps or step < first - warmup:
            return action.NONE
        if step < first:
            return action.WARMUP
        return action.RECORD if step < first + steps - 1 else action.RECORD_AND_SAVE

    return decide
