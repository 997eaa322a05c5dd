"""Registers the backbones."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_backbones.mlp import MLP
    from dmmd_backbones.transformer import Transformer
    from dmmd_backbones.unet import UNet
    from dmmd_backbones.uvit import UViT

    registry.add("backbone", "mlp", MLP)
    registry.add("backbone", "transformer", Transformer)
    registry.add("backbone", "unet", UNet)
    registry.add("backbone", "uvit", UViT)
