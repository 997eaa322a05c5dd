"""Registers the objectives."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_objectives.denoising import Denoising
    from dmmd_objectives.moment_matching import MomentMatching
    from dmmd_objectives.sdtt import SelfDistillation

    registry.add("objective", "denoising", Denoising)
    registry.add("objective", "moment_matching", MomentMatching)
    registry.add("objective", "sdtt", SelfDistillation)
