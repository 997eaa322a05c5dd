"""A student with input noise, projected and added to the input embeddings (D-MMD paper, section on input noise)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmmd_core import Backbone, Draws, Generator, Process, Requirement, option


class NoiseConditioned(Generator):
    """Input noise of one of three shapes, drawn anew at every step.

    ``sequence``: one Gaussian vector for the whole sequence, or for each of its blocks; ``position``: one per position;
    ``pyramid``: one per position, the normalised sum of Gaussians at all resolutions of the grid (1, 2, 4, ... cells a
    side).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        latent: Literal["sequence", "position", "pyramid"] = option("position", help="shape of the input noise")
        width: int = option(32, help="Gaussians per sequence or per position", minimum=1)
        initial_scale: float = option(
            1.0, help="standard deviation of the projected noise at the start of training", above=0
        )

    def __init__(
        self,
        config: NoiseConditioned.Config,
        *,
        backbone: Backbone,
        process: Process,
        length: int,
        grid: tuple[int, ...] | None,
    ) -> None:
        super().__init__(backbone=backbone, process=process)
        self.config = config
        self.length = length
        self.grid = grid
        self.project = nn.Linear(config.width, backbone.embedding_width)
        nn.init.normal_(self.project.weight, std=config.initial_scale / math.sqrt(config.width))
        nn.init.zeros_(self.project.bias)

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`; a pyramid spans the whole grid."""
        return frozenset({"latent"} if config.latent == "pyramid" else {"blocks", "latent"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        needs = [Requirement("backbone", "input_noise", "to add noise to the input embeddings")]
        if config.latent == "pyramid":
            needs.append(Requirement("data", "grid", "to draw noise at several resolutions", "latent"))
        return needs

    @property
    def takes_latent(self) -> bool:
        """See `Denoiser.takes_latent`."""
        return True

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor:
        """See `Denoiser.draw_latent`; ``[batch, 1 or length, width]``, unit variance."""
        length, width = length or self.length, self.config.width
        if self.config.latent == "pyramid":
            return self._pyramid(draws)
        if self.config.latent == "position":
            return draws.normal("latent", (length, width))
        if self.block_size is None:
            return draws.normal("latent", (1, width))
        return draws.normal("latent", (length // self.block_size, width)).repeat_interleave(self.block_size, dim=1)

    def input_noise(self, latent: Tensor) -> Tensor:
        """See `Generator.input_noise`."""
        noise = self.project(latent.to(self.project.weight.dtype))
        return noise if self.block_size is not None else noise.expand(-1, self.length, -1)

    def _pyramid(self, draws: Draws) -> Tensor:
        assert self.grid is not None  # refused by `requires`
        height, width, *rest = self.grid
        channels = self.config.width
        total = torch.zeros((), device=draws.device)
        levels = max(height, width).bit_length()
        for level in range(levels):
            cell = 2**level
            rows, columns = -(-height // cell), -(-width // cell)
            noise = draws.normal(f"latent{level}", (rows, columns, *rest, channels))
            noise = noise.repeat_interleave(cell, 1)[:, :height].repeat_interleave(cell, 2)[:, :, :width]
            total = total + noise
        return (total / math.sqrt(levels)).reshape(draws.batch, self.length, channels)
