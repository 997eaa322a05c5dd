"""Di[M]O (Zhu, Wang, Lathuiliere, Kalogeiton, arXiv:2503.15457): a masked diffusion teacher into one step.

Samples of the one-step student are masked again; at the masked positions the divergence between teacher and auxiliary
is differentiated by the auxiliary's logits, and that gradient is given to the student's logits (section 3.2, algorithm
1). The randomness of the start, tokens of which a part is random instead of [MASK] and noise on the embeddings (section
3.3), is the generator's: `partly_random`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmmd_core import Batch, Draws, option
from dmmd_objectives.fake import FakeGame


def score_gradient(weights: Tensor, log_theta: Tensor, log_phi: Tensor) -> Tensor:
    """``w_j (e_j - sum_c w_c e_c)`` with ``e = log phi - log theta``, ``[rows, vocab]``.

    With the auxiliary's probabilities as weights it is the gradient of KL(phi, theta) in phi's logits, the reverse
    branch of Di[M]O. With the student's it is D-MMD's gradient in the student's logits: the two differ in this one
    factor.
    """
    excess = log_phi - log_theta
    return weights * (excess - (weights * excess).sum(-1, keepdim=True))


def jeffreys(log_theta: Tensor, log_phi: Tensor, coefficient: float, floor: float) -> tuple[Tensor, Tensor]:
    """``(1 - c) KL(theta, phi) + c KL(phi, theta)``, ``[rows]``, and its gradient in phi's logits, ``[rows, vocab]``.

    Args:
        log_theta: Teacher's log-probabilities, ``[rows, vocab]``.
        log_phi: Auxiliary's.
        coefficient: c.
        floor: Logarithms below it are raised to it; the probabilities before them are not.
    """
    theta, phi = log_theta.exp(), log_phi.exp()
    log_theta, log_phi = log_theta.clamp_min(floor), log_phi.clamp_min(floor)
    excess = log_phi - log_theta
    divergence = coefficient * (phi * excess).sum(-1) - (1 - coefficient) * (theta * excess).sum(-1)
    return divergence, (1 - coefficient) * (phi - theta) + coefficient * score_gradient(phi, log_theta, log_phi)


class DiMO(FakeGame):
    """Di[M]O: ``grad = d/dlogits_phi D(theta, phi)`` at masked positions of re-masked samples, put on the student."""

    hard_target = True

    @dataclass(frozen=True, kw_only=True)
    class Config(FakeGame.Config):
        """Parameters."""

        auxiliary_turns: int = option(
            2, help="turns of the auxiliary for each of the student's; where it falls behind, the two circle", minimum=1
        )
        jeffreys_coefficient: float = option(
            -0.2, help="weight c of the reverse branch: (1 - c) KL(teacher, auxiliary) + c KL(auxiliary, teacher)"
        )

    def start(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """See `FakeGame.start`: the prior at t = 1."""
        z = self.process.prior_sample(self.length, draws)
        return z, torch.ones(draws.batch, dtype=torch.float64, device=draws.device)

    def student_losses(self, log_p: Tensor, log_theta: Tensor, log_phi: Tensor) -> Tensor:
        """See `FakeGame.student_losses`: the value is the divergence, the gradient in the logits that of phi's."""
        divergence, gradient = jeffreys(log_theta, log_phi, self.config.jeffreys_coefficient, self.floor)
        # The gradient sums to zero over the vocabulary, so that it passes through the log-softmax unchanged.
        push = (gradient * log_p).sum(-1)
        return push - push.detach() + divergence
