"""Shaping of a teacher's prediction that a student absorbs: temperature, then top-p.

Order and constant follow the paper (DESIGN, "The mathematics"): top-p lowers the log-probabilities outside the
nucleus by a constant and never to minus infinity, which would make the student's loss diverge.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.interfaces.denoiser import Condition, Denoiser, Prediction


def shape_log_probs(log_probs: Tensor, temperature: float = 1.0, top_p: float = 1.0, lowering: float = 2.0) -> Tensor:
    """Apply temperature and soft top-p to log-probabilities.

    Args:
        log_probs: ``[rows, vocab]``, normalised.
        temperature: tau > 0; the result is ``softmax(log_probs / tau)`` before top-p.
        top_p: Mass of the nucleus in (0, 1]: the smallest set of most likely tokens that reaches it.
        lowering: Nats taken off every token outside the nucleus.

    Returns:
        Normalised log-probabilities of the same shape.
    """
    if temperature != 1.0:
        log_probs = (log_probs / temperature).log_softmax(-1)
    if top_p < 1.0:
        log_probs = torch.where(_outside(log_probs, top_p), log_probs - lowering, log_probs).log_softmax(-1)
    return log_probs


@torch.no_grad()
def _outside(log_probs: Tensor, top_p: float) -> Tensor:
    """Tokens outside the nucleus, bool ``[rows, vocab]``."""
    ordered, order = log_probs.sort(dim=-1, descending=True)
    probs = ordered.exp_()
    outside = probs.cumsum(-1).sub_(probs) >= top_p
    return torch.empty_like(outside).scatter_(-1, order, outside)


class ShapedPrediction(Prediction):
    """A prediction seen through temperature and top-p."""

    def __init__(self, inner: Prediction, temperature: float, top_p: float, lowering: float) -> None:
        self._inner = inner
        self._settings = (temperature, top_p, lowering)
        self.num_rows, self.vocab_size = inner.num_rows, inner.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return shape_log_probs(self._inner.log_probs(rows), *self._settings)

    def sources(self) -> tuple[Tensor, ...]:
        """See `Prediction.sources`."""
        return self._inner.sources()

    def from_sources(self, rows: Tensor, sources: Sequence[Tensor]) -> Prediction:
        """See `Prediction.from_sources`."""
        return ShapedPrediction(self._inner.from_sources(rows, sources), *self._settings)


class ShapedDenoiser(Denoiser):
    """A denoiser whose predictions are shaped.

    Args:
        inner: The denoiser.
        temperature: See `shape_log_probs`.
        top_p: See `shape_log_probs`.
        lowering: See `shape_log_probs`.
    """

    def __init__(
        self, inner: Denoiser, *, temperature: float = 1.0, top_p: float = 1.0, lowering: float = 2.0
    ) -> None:
        super().__init__()
        self.inner = inner
        self._settings = (temperature, top_p, lowering)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`."""
        return ShapedPrediction(self.inner(z_t, t, condition, latent), *self._settings)

    def draw_latent(self, draws: Draws) -> Tensor | None:
        """See `Denoiser.draw_latent`."""
        return self.inner.draw_latent(draws)

    @property
    def takes_latent(self) -> bool:
        """See `Denoiser.takes_latent`."""
        return self.inner.takes_latent
