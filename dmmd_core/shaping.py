"""Shaping of a teacher's prediction that a student absorbs: guidance, then temperature, then top-p.

Order and constant follow the paper (DESIGN, "The mathematics"): top-p lowers the log-probabilities outside the
nucleus by a constant and never to minus infinity, which would make the student's loss diverge.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core.draws import Draws
from dmmd_core.errors import UnsupportedError
from dmmd_core.interfaces.denoiser import Condition, Denoiser, Prediction

# What counts as the unconditional log-probability of a token that the unconditional prediction excludes: finite, for
# the difference of two infinities is none.
_EXCLUDED = math.log(torch.finfo(torch.float32).tiny)


def guide_log_probs(conditional: Tensor, unconditional: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance between two factorised predictions of the clean tokens.

    ``log p = guidance * log p(x | label) + (1 - guidance) * log p(x) + constant``: the scale gamma of Schiff et al.
    (arXiv:2412.10193), where 1 leaves the conditional prediction and 0 gives the unconditional one; the weight of Ho
    and Salimans (arXiv:2207.12598) is ``guidance - 1``. Schiff et al. guide the distribution of z_s; here it is the
    clean mean, so that the rate at which the process restores tokens stays its own.

    Args:
        conditional: Log-probabilities given the label, ``[rows, vocab]``, normalised.
        unconditional: Log-probabilities without label, ``[rows, vocab]``, normalised.
        guidance: Scale, at least 0.

    Returns:
        Normalised log-probabilities ``[rows, vocab]``. What the conditional prediction excludes stays excluded, so
        that known tokens are carried over.
    """
    if guidance == 1.0:
        return conditional
    if guidance == 0.0:
        return unconditional
    return (guidance * conditional + (1 - guidance) * unconditional.clamp_min(_EXCLUDED)).log_softmax(-1)


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


class GuidedPrediction(Prediction):
    """Two predictions, with and without label, joined by `guide_log_probs` row by row."""

    def __init__(self, conditional: Prediction, unconditional: Prediction, guidance: float) -> None:
        self._conditional, self._unconditional, self._guidance = conditional, unconditional, guidance
        self.num_rows, self.vocab_size = conditional.num_rows, conditional.vocab_size

    def log_probs(self, rows: Tensor | None = None) -> Tensor:
        """See `Prediction.log_probs`."""
        return guide_log_probs(self._conditional.log_probs(rows), self._unconditional.log_probs(rows), self._guidance)


@dataclass(frozen=True)
class _Contexts:
    """Finished blocks as the denoiser encodes them with their label and without one."""

    conditional: object
    unconditional: object


class ShapedDenoiser(Denoiser):
    """A denoiser whose predictions are shaped: guidance first, then temperature, then top-p.

    Args:
        inner: The denoiser.
        guidance: See `guide_log_probs`; None where that is left to others (`guided`). Any scale but 1 asks the
            denoiser twice a call, once with the label ``num_classes``, which means "no label"; finished blocks are
            then encoded twice too, and every prediction sees them with its own label or without.
        num_classes: Number of classes; needed for guidance.
        temperature: See `shape_log_probs`.
        top_p: See `shape_log_probs`.
        lowering: See `shape_log_probs`.

    Raises:
        ValueError: Guidance without classes.
    """

    def __init__(
        self,
        inner: Denoiser,
        *,
        guidance: float | None = None,
        num_classes: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        lowering: float = 2.0,
    ) -> None:
        super().__init__()
        self.inner = inner
        self.block_size = inner.block_size
        self.guidance = guidance
        self.num_classes = num_classes
        self._settings = (temperature, top_p, lowering)
        if self._guides and num_classes is None:
            raise ValueError("guidance needs the number of classes, whose value means 'no label'; got none")

    def guided_by(self, guidance: float, num_classes: int | None) -> ShapedDenoiser:
        """The same shaping after guidance."""
        temperature, top_p, lowering = self._settings
        return ShapedDenoiser(
            self.inner,
            guidance=guidance,
            num_classes=num_classes,
            temperature=temperature,
            top_p=top_p,
            lowering=lowering,
        )

    @property
    def _guides(self) -> bool:
        return self.guidance is not None and self.guidance != 1.0

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        """See `Denoiser.forward`.

        Raises:
            ValueError: Guidance, and the condition has no labels.
            UnsupportedError: Guidance, and the condition has a context that was not encoded by a guided denoiser.
        """
        if self.guidance is None or not self._guides:
            return ShapedPrediction(self.inner(z_t, t, condition, latent), *self._settings)
        with_label, without = (self.inner(z_t, t, one, latent) for one in self._both(condition))
        return ShapedPrediction(GuidedPrediction(with_label, without, self.guidance), *self._settings)

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        """See `Denoiser.encode`; a guided denoiser's context holds two, and serves guided denoisers alone."""
        if not self._guides:
            return self.inner.encode(tokens, condition)
        return _Contexts(*(self.inner.encode(tokens, one) for one in self._both(condition)))

    def draw_latent(self, draws: Draws, length: int | None = None) -> Tensor | None:
        """See `Denoiser.draw_latent`."""
        return self.inner.draw_latent(draws, length)

    @property
    def takes_latent(self) -> bool:
        """See `Denoiser.takes_latent`."""
        return self.inner.takes_latent

    def _both(self, condition: Condition | None) -> tuple[Condition, Condition]:
        """What the denoiser is told with the label and without it."""
        if condition is None or condition.label is None:
            raise ValueError("guidance needs labels, but the condition has none; give labels, or set guidance to 1")
        contexts = _Contexts(None, None) if condition.context is None else condition.context
        if not isinstance(contexts, _Contexts):
            raise UnsupportedError(
                "guidance cannot take the label out of a context of finished blocks that was made without guidance; "
                "encode them with the guided denoiser"
            )
        assert self.num_classes is not None
        return (
            dataclasses.replace(condition, context=contexts.conditional),
            dataclasses.replace(
                condition,
                label=torch.full_like(condition.label, self.num_classes),
                context=contexts.unconditional,
            ),
        )


def guided(denoiser: Denoiser, guidance: float, num_classes: int | None) -> Denoiser:
    """Guide a denoiser, unless whoever made it has decided about guidance already.

    Args:
        denoiser: The denoiser.
        guidance: See `guide_log_probs`.
        num_classes: Number of classes; may be None where `guidance` is 1.
    """
    if guidance == 1.0:
        return denoiser
    if isinstance(denoiser, ShapedDenoiser):
        # Guidance comes first, whoever shapes.
        return denoiser if denoiser.guidance is not None else denoiser.guided_by(guidance, num_classes)
    return ShapedDenoiser(denoiser, guidance=guidance, num_classes=num_classes)
