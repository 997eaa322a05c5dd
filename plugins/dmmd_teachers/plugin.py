"""Registers the teachers."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_teachers.exact import Exact
    from dmmd_teachers.from_run import FromRun
    from dmmd_teachers.transformers_masked import TransformersMasked

    registry.add("teacher", "exact", Exact)
    registry.add("teacher", "from_run", FromRun)
    registry.add("teacher", "transformers_masked", TransformersMasked)
