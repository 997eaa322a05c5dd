"""Registers the generators."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_generators.deterministic import Deterministic
    from dmmd_generators.noise_conditioned import NoiseConditioned
    from dmmd_generators.partly_random import PartlyRandom

    registry.add("generator", "noise_conditioned", NoiseConditioned)
    registry.add("generator", "deterministic", Deterministic)
    registry.add("generator", "partly_random", PartlyRandom)
