"""What training uses: its time by part, and its memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_REST = ""
_GIB = 2**30


class StepTimes:
    """Divides the time of training steps among named parts, one within another counting for itself alone.

    A part costs two looks at the clock. On CUDA, where the clock of the CPU would measure how fast work is handed out,
    they are events on the stream, read when `shares` is asked.

    Args:
        device: Where the steps are computed.

    Attributes:
        cuda: Whether events are the clock; they are not free, and only some steps should be measured.
        annotate: Whether parts carry their names into a profiler's trace.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.annotate = False
        self._device = device
        self._running = False
        self._current = _REST
        self._around: list[tuple[str, Any]] = []  # the parts around the current one, each with its own annotation
        self._annotation: Any = None
        self._since = 0.0
        self._spent: dict[str, float] = {}
        self._events: list[tuple[str, Any]] = []  # what went on until the event

    def start(self) -> None:
        """Measure from here on; nothing where that has been said before."""
        if self._running:
            return
        self._running, self._spent, self._events = True, {}, []
        self._since = time.perf_counter()
        self._mark()

    def shares(self) -> dict[str, float]:
        """Share of every part in the time since `start`, which has to be said anew; empty where it was not."""
        if not self._running:
            return {}
        self._mark()
        self._running = False
        if self.cuda:
            self._events[-1][1].synchronize()
            for (_, before), (name, event) in zip(self._events, self._events[1:], strict=False):
                self._spent[name] = self._spent.get(name, 0.0) + before.elapsed_time(event)
        total = max(sum(self._spent.values()), 1e-9)
        return {name: spent / total for name, spent in self._spent.items() if name != _REST}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Context of a part."""
        depth = len(self._around)
        self._enter(name)
        try:
            yield
        finally:
            while len(self._around) > depth:  # more than one where a module within has raised
                self._leave()

    @contextmanager
    def following(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Context in which the forward passes of these modules are parts, by name."""
        with ExitStack() as hooks:
            for name, module in modules.items():
                for handle in self._follow(name, module):
                    hooks.callback(handle.remove)
            yield

    def _follow(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        # Functions, since a module that is copied in the meantime takes its hooks along, and bound methods would take
        # a copy of this object.
        def before(*_: Any) -> None:
            self._enter(name)

        def after(*_: Any) -> None:
            self._leave()

        return module.register_forward_pre_hook(before, prepend=True), module.register_forward_hook(after)

    def _enter(self, name: str) -> None:
        self._mark()
        self._around.append((self._current, self._annotation))
        self._current = name
        self._annotation = torch.profiler.record_function(name).__enter__() if self.annotate else None

    def _leave(self) -> None:
        self._mark()
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
        self._current, self._annotation = self._around.pop()

    def _mark(self) -> None:
        """Count the time since the last mark for the current part."""
        if not self._running:
            return
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append((self._current, event))
            return
        now = time.perf_counter()
        self._spent[self._current] = self._spent.get(self._current, 0.0) + now - self._since
        self._since = now


def is_circumstance(metric: str) -> bool:
    """Whether a metric of a training step tells how it was trained (speed, time, memory), not what was learned."""
    return metric == "learning_rate" or metric.endswith(("_per_second", "_time_share", "_gib"))


def peak_memory(device: torch.device) -> dict[str, float]:
    """Most memory that this process has used so far, in GiB, under a name that tells which.

    ``peak_cuda_memory_gib`` is what PyTorch's allocator has given out on a CUDA device; ``peak_process_memory_gib`` is
    the process's resident memory, libraries included. Empty where the system does not tell.
    """
    if device.type == "cuda":
        return {"peak_cuda_memory_gib": torch.cuda.max_memory_allocated(device) / _GIB}
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_memory_gib": peak * (1 if sys.platform == "darwin" else 1024) / _GIB}
