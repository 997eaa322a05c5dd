"""Generator: the student, a denoiser with input noise."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

from torch import Tensor

from dmmd_core.interfaces.backbone import Backbone
from dmmd_core.interfaces.component import Component
from dmmd_core.interfaces.denoiser import Condition, Denoiser, NetworkPrediction, Prediction, network_times
from dmmd_core.interfaces.process import Process


class Generator(Denoiser, Component, ABC):
    """A few-step generator around a backbone.

    The distribution over whole sequences stays factorised given the latent; correlation between positions comes
    from the latent, drawn apart from the forward call (`draw_latent`). Capability ``blocks`` if a latent can be drawn
    for a single block.

    Args:
        backbone: The network, which starts from the teacher's weights.
        process: The noise process.
    """

    kind: ClassVar[str] = "generator"

    def __init__(self, *, backbone: Backbone, process: Process) -> None:
        super().__init__()
        self.backbone = backbone
        self.process = process
        self.block_size = backbone.block_size

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """See `Denoiser.encode`; finished blocks get no input noise."""
        return self.backbone.encode(tokens, condition or Condition())

    def input_noise(self, latent: Tensor) -> Tensor:
        """Project a latent to ``[batch, length, embedding_width]``, added to the input embeddings."""
        raise NotImplementedError(f"{type(self).__name__} takes no latent")

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`; a generator with input noise must be given its latent."""
        if self.takes_latent != (latent is not None):
            raise ValueError(f"{type(self).__name__} {'needs a' if self.takes_latent else 'takes no'} latent")
        noise = None if latent is None else self.input_noise(latent)
        condition = condition or Condition()
        features = self.backbone.features(z_t, network_times(t, condition), condition, noise)
        return NetworkPrediction(self.backbone, self.process, features, z_t, t)
