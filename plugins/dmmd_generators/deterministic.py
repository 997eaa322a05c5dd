"""A student without input noise: its randomness is that of z_t and of the token draws alone."""

from __future__ import annotations

from typing import Any

from dmmd_core import Backbone, Generator, Process


class Deterministic(Generator):
    """The ablation of `noise_conditioned`: one masked step cannot pass the best product distribution."""

    def __init__(self, config: Deterministic.Config, *, backbone: Backbone, process: Process) -> None:
        super().__init__(backbone=backbone, process=process)
        self.config = config

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"blocks"})
