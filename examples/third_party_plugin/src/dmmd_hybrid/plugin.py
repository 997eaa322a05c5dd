"""Registers the process."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_hybrid.hybrid import Hybrid

    registry.add("process", "hybrid", Hybrid)
