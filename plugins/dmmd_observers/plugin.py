"""Registers the observers."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_observers.tensorboard import TensorBoard
    from dmmd_observers.wandb import WeightsAndBiases

    registry.add("observer", "tensorboard", TensorBoard)
    registry.add("observer", "wandb", WeightsAndBiases)
