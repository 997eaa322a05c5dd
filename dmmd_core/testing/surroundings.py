"""What a component must leave as it found it."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


def _set_default_device(value: torch.device) -> None:
    torch.set_default_device(None if value.type == "cpu" else value)


_PYTHON = "python's random state"
# What is watched: its name for people, how it is read, and how it is put back.
_WATCHED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's random state": (torch.get_rng_state, torch.set_rng_state),
    "numpy's random state": (lambda: np.random.get_state(), lambda value: np.random.set_state(value)),
    _PYTHON: (random.getstate, random.setstate),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, _set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "the choice of reproducible algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "TF32 of matrix products": (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda value: setattr(torch.backends.cuda.matmul, "allow_tf32", value),
    ),
    "cuDNN's benchmark mode": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "the working directory": (os.getcwd, os.chdir),
}  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """The global state at one moment.

    Attributes:
        values: Every watched value by its name.
        modules: Number of modules imported so far.
    """

    values: dict[str, Any]
    modules: int = 0

    @classmethod
    def now(cls) -> Surroundings:
        """Read it."""
        return cls({name: read() for name, (read, _) in _WATCHED.items()}, len(sys.modules))

    def changes(self) -> list[str]:
        """Name what has changed since."""
        found = []
        for name, after in Surroundings.now().values.items():
            before = self.values[name]
            if name == _PYTHON and self.modules != len(sys.modules):
                continue  # a library that is imported for the first time may draw; the next call will tell
            if not _same(before, after):
                simple = isinstance(after, bool | int | str | torch.dtype | torch.device)
                found.append(f"{name} went from {before} to {after}" if simple else f"{name} changed")
        return found

    def restore(self) -> None:
        """Put everything back."""
        for name, (_, write) in _WATCHED.items():
            write(self.values[name])


def _same(before: Any, after: Any) -> bool:
    if isinstance(before, torch.Tensor):
        return torch.equal(before, after)
    if isinstance(before, tuple):
        return len(before) == len(after) and all(map(_same, before, after))
    if isinstance(before, np.ndarray):
        return bool(np.array_equal(before, after))
    return bool(before == after)
