"""Registers the codecs."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_codecs.characters import Bytes, Characters
    from dmmd_codecs.diffusers_vq import DiffusersVQ
    from dmmd_codecs.integers import Integers
    from dmmd_codecs.kmeans_patches import KMeansPatches
    from dmmd_codecs.pixels import Pixels
    from dmmd_codecs.subwords import BytePairs, Pretrained
    from dmmd_codecs.vq_autoencoder import VQAutoencoder

    registry.add("codec", "integers", Integers)
    registry.add("codec", "byte", Bytes)
    registry.add("codec", "char", Characters)
    registry.add("codec", "bpe", BytePairs)
    registry.add("codec", "pretrained", Pretrained)
    registry.add("codec", "pixels", Pixels)
    registry.add("codec", "kmeans_patches", KMeansPatches)
    registry.add("codec", "diffusers_vq", DiffusersVQ)
    registry.add("codec", "vq_autoencoder", VQAutoencoder)
