"""Registers the processes and schedules."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_processes.masked import Masked
    from dmmd_processes.schedules import Cosine, Linear, MaskGITCosine, Polynomial
    from dmmd_processes.uniform import Uniform

    registry.add("schedule", "linear", Linear)
    registry.add("schedule", "cosine", Cosine)
    registry.add("schedule", "maskgit_cosine", MaskGITCosine)
    registry.add("schedule", "polynomial", Polynomial)
    registry.add("process", "masked", Masked)
    registry.add("process", "uniform", Uniform)
