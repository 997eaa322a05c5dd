"""Parameters that every sampler of this package has: how predictions are shaped before a token is drawn."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from dmmd_core import Requirement, option, shape_log_probs


@dataclass(frozen=True, kw_only=True)
class ShapedConfig:
    """Guidance, temperature and top-p, in this order; and how many logits are alive at a time."""

    chunk_rows: int = option(0, help="rows of logits alive at a time; 0 for all at once", minimum=0)
    guidance: float = option(1.0, help="classifier-free guidance of a teacher's predictions; 1 is none", minimum=0)
    temperature: float = option(1.0, help="temperature of every prediction", above=0)
    top_p: float = option(1.0, help="nucleus of every prediction", above=0, maximum=1)
    top_p_lowering: float | None = option(
        None, help="nats taken off tokens outside the nucleus; null removes them", above=0
    )

    def shape(self, log_probs: Tensor) -> Tensor:
        """Apply temperature and top-p to log-probabilities ``[rows, vocab]``; guidance is a matter of the denoiser."""
        lowering = math.inf if self.top_p_lowering is None else self.top_p_lowering
        return shape_log_probs(log_probs, self.temperature, self.top_p, lowering)

    def requirements(self) -> list[Requirement]:
        """What guidance needs of other roles."""
        if self.guidance == 1.0:
            return []
        return [
            Requirement("backbone", "labels", "to guide by labels", "guidance"),
            Requirement("teacher", "unlabelled", "(training with label dropout) to be guided", "guidance"),
        ]
