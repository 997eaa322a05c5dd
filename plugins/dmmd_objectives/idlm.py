"""Inverse-distilled diffusion language models (Li et al., arXiv:2602.19066), masked form.

``min_student max_auxiliary E[ L_s(x, teacher) - L_s(x, auxiliary) ]`` with the student's soft output for x, which is
noised again at a time s that does not depend on the student's own t. The teacher is the best denoiser of its data:
where the auxiliary cannot better it on the student's samples, these are the data.
"""

from __future__ import annotations

from torch import Tensor

from dmmd_core import Batch, Draws
from dmmd_objectives.fake import FakeGame


class InverseDistillation(FakeGame):
    """IDLM: the teacher's loss on the student's soft output less the auxiliary's; no gradient through z_s."""

    hard_target = False

    def start(self, batch: Batch, draws: Draws) -> tuple[Tensor, Tensor]:
        """See `FakeGame.start`: data, corrupted at ``t ~ U(0, 1)``."""
        t = draws.uniform("t")
        return self.process.corrupt(batch.tokens, t, draws), t

    def student_losses(self, log_p: Tensor, log_theta: Tensor, log_phi: Tensor) -> Tensor:
        """See `FakeGame.student_losses`: ``-sum_c p_c (log theta_c - log phi_c)``."""
        return (log_p.exp() * (log_phi.clamp_min(self.floor) - log_theta.clamp_min(self.floor))).sum(-1)
