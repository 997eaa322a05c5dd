"""Device and precision of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.errors import FieldError, RunError
from dmmd_core.interfaces import Condition, Denoiser, Sampler, Samples


def choose_device(name: str, where: str = "run.device: ") -> torch.device:
    """Turn a recipe's ``run.device`` into a device.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        where: Start of the messages.

    Raises:
        RunError: The name means nothing, or the device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RunError(f"{where}no device is called {name!r}; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"{where}{name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RunError(f"{where}{name!r} is not there ({torch.cuda.device_count()} CUDA devices found); use auto")
    return device


def component_device(name: str) -> torch.device:
    """Turn a component's own parameter ``device`` into a device, as `choose_device` does.

    Raises:
        FieldError: The name means nothing, or the device is not there.
    """
    try:
        return choose_device(name, where="")
    except RunError as error:
        raise FieldError("device", str(error)) from error


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn ``run.precision`` into the dtype of the networks' matrix products."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def tf32_matrix_products(wanted: bool, device: torch.device) -> AbstractContextManager[object]:
    """Context in which float32 matrix products on CUDA run in TensorFloat-32, where that is wanted."""
    return _TensorFloat32() if wanted and device.type == "cuda" else nullcontext()


class _TensorFloat32:
    """Sets PyTorch's global switch and puts it back."""

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Context in which the networks run; weights, softmax, losses and draws keep their own precision."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


class AutocastSampler(Sampler):
    """A sampler whose network calls run in the precision of the run, for evaluation and metrics alike.

    Args:
        inner: The sampler.
        device: Where the networks are.
        dtype: Precision of their matrix products.
    """

    def __init__(self, inner: Sampler, device: torch.device, dtype: torch.dtype) -> None:
        self.inner = inner
        self.device = device
        self.dtype = dtype

    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
        length: int | None = None,
    ) -> Samples:
        """See `Sampler.sample`."""
        with autocast(self.device, self.dtype):
            return self.inner.sample(
                denoiser, draws, num_steps=num_steps, condition=condition, last_step=last_step, length=length
            )

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """See `Sampler.prepared`."""
        return self.inner.prepared(denoiser)

    def step_times(self, left: Tensor) -> Tensor:
        """See `Sampler.step_times`."""
        return self.inner.step_times(left)

    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> Tensor:
        """See `Sampler.distribution`."""
        with autocast(self.device, self.dtype):
            return self.inner.distribution(denoiser, num_steps=num_steps, context=context, length=length)
