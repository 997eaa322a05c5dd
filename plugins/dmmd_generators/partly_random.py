"""A student that is shown random tokens instead of some [MASK]s (Di[M]O, Zhu et al., arXiv:2503.15457, section 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmmd_core import (
    Backbone,
    Condition,
    Draws,
    Generator,
    NetworkPrediction,
    Prediction,
    Process,
    Requirement,
    network_times,
    option,
)


class PartlyRandom(Generator):
    """Randomness by token initialisation: random clean tokens at a share of the masked positions, noise on embeddings.

    Only the network's input changes. For the process these positions stay masked and are drawn, so that any sampler
    works.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        masked_share: float = option(
            0.6,
            help="probability that a masked position is shown as [MASK] and not as a random token",
            minimum=0,
            below=1,
        )
        width: int = option(32, help="Gaussians per position, projected into the embeddings", minimum=1)
        initial_scale: float = option(
            0.1, help="standard deviation of the projected noise at the start of training", above=0
        )

    def __init__(self, config: PartlyRandom.Config, *, backbone: Backbone, process: Process, length: int) -> None:
        super().__init__(backbone=backbone, process=process)
        self.config = config
        self.length = length
        self.project = nn.Linear(config.width, backbone.embedding_width)
        nn.init.normal_(self.project.weight, std=config.initial_scale / math.sqrt(config.width))
        nn.init.zeros_(self.project.bias)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`."""
        return frozenset({"blocks", "latent"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [
            Requirement("process", "masks", "to have positions that can be shown as random tokens"),
            Requirement("backbone", "input_noise", "to add noise to the input embeddings"),
        ]

    @property
    def takes_latent(self) -> bool:
        """See `Denoiser.takes_latent`."""
        return True

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor:
        """See `Denoiser.draw_latent`; ``[batch, length, 1 + width]``: the id to show if masked, and unit Gaussians."""
        length, size = length or self.length, self.process.vocab_size
        token = draws.integers("latent_token", size, (length,))
        masked = draws.uniform("latent_masked", (length,)) < self.config.masked_share
        shown = torch.where(masked, size, token).to(torch.float32)  # whole numbers below 2^24 are exact
        return torch.cat((shown.unsqueeze(-1), draws.normal("latent", (length, self.config.width))), dim=-1)

    def input_noise(self, latent: Tensor) -> Tensor:
        """See `Generator.input_noise`."""
        noise: Tensor = self.project(latent[..., 1:].to(self.project.weight.dtype))
        return noise

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Generator.forward`; the prediction knows z_t as it is."""
        if latent is None:
            raise ValueError(f"{type(self).__name__} needs a latent")
        condition = condition or Condition()
        shown = torch.where(z_t == self.process.vocab_size, latent[..., 0].long(), z_t)
        features = self.backbone.features(shown, network_times(t, condition), condition, self.input_noise(latent))
        return NetworkPrediction(self.backbone, self.process, features, z_t, t)
