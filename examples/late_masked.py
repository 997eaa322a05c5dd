"""Research fork: the process `masked` with one method changed; nothing of it is copied, and the core is not edited."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dmmd_core import PluginRegistrar, hookimpl, option
from dmmd_processes.masked import Masked


class LateMasked(Masked):
    """Masked, with a weight of the loss that falls with time."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Masked.Config):
        """The parameters of `masked`, and one more."""

        tilt: float = option(0.5, help="factor on the weight at t = 1", above=0, maximum=1)

    config: LateMasked.Config

    def loss_weight(self, s: Tensor) -> Tensor:
        """See `Process.loss_weight`."""
        return super().loss_weight(s) * (1 - (1 - self.config.tilt) * s)


@hookimpl
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register the process under a name of its own."""
    registry.add("process", "late_masked", LateMasked)
