"""Registers the samplers."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_samplers.ancestral import Ancestral
    from dmmd_samplers.block import Block

    registry.add("sampler", "ancestral", Ancestral)
    registry.add("sampler", "block", Block)
