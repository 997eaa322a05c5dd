"""Registers the data."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_data.cifar10 import Cifar10
    from dmmd_data.digits import Digits
    from dmmd_data.enumerable import MarkovChain, Mixture, TiedCoins
    from dmmd_data.image_arrays import ImageArrays
    from dmmd_data.image_dataset import ImageDataset
    from dmmd_data.image_folder import ImageFolder
    from dmmd_data.image_pixels import ImagePixels
    from dmmd_data.shapes import Shapes
    from dmmd_data.text import Text
    from dmmd_data.vq_tokens import VQTokens

    registry.add("data", "digits", Digits)
    registry.add("data", "tied_coins", TiedCoins)
    registry.add("data", "markov_chain", MarkovChain)
    registry.add("data", "mixture", Mixture)
    registry.add("data", "text", Text)
    registry.add("data", "image_pixels", ImagePixels)
    registry.add("data", "vq_tokens", VQTokens)
    registry.add("image_source", "cifar10", Cifar10)
    registry.add("image_source", "image_folder", ImageFolder)
    registry.add("image_source", "image_dataset", ImageDataset)
    registry.add("image_source", "image_arrays", ImageArrays)
    registry.add("image_source", "shapes", Shapes)
