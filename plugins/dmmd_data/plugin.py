"""Registers the data."""

from __future__ import annotations

from dmmd_core import PluginRegistrar, hookimpl


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the components of this package."""
    from dmmd_data.digits import Digits
    from dmmd_data.enumerable import MarkovChain, Mixture, TiedCoins
    from dmmd_data.text import Text

    registry.add("data", "digits", Digits)
    registry.add("data", "tied_coins", TiedCoins)
    registry.add("data", "markov_chain", MarkovChain)
    registry.add("data", "mixture", Mixture)
    registry.add("data", "text", Text)
