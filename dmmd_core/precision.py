"""Device and precision of a run."""

from __future__ import annotations

import torch

from dmmd_core.errors import RunError


def choose_device(name: str) -> torch.device:
    """Turn a recipe's ``run.device`` into a device.

    Raises:
        RunError: The name means nothing, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"run.device: no device is called {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"run.device: {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"run.device: {name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use auto")
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn ``run.precision`` into the dtype of the networks' matrix products."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which the networks run; weights, softmax, losses and draws keep their own precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
