"""Training over all blocks of a sequence at once: a time for each block, the clean tokens for what comes before it.

Block-autoregressive diffusion (Arriola et al., arXiv:2503.09573, section 3): ``p(x) = prod_i p(x^i | x^{<i})``, each
factor a diffusion of its own, so that the loss of a sequence is the sum over its blocks. A denoiser without a
`block_size` has one time per sample and is told nothing more.
"""

from __future__ import annotations

from torch import Tensor

from dmmd_core.interfaces import Batch, Condition, Denoiser


def times_per_sample(network: Denoiser, batch: Batch) -> tuple[int, ...]:
    """Shape per sample of the times of a training step: ``()``, or ``(blocks,)``."""
    if network.block_size is None:
        return ()
    return (batch.tokens.shape[1] // network.block_size,)


def times_per_position(network: Denoiser, times: Tensor) -> Tensor:
    """Give every position the time of its block: ``[batch, blocks]`` to ``[batch, length]``; ``[batch]`` as it is."""
    if network.block_size is None:
        return times
    return times.repeat_interleave(network.block_size, dim=1)


def training_condition(network: Denoiser, batch: Batch) -> Condition:
    """What a network is told in training: labels and, where it has blocks, the clean tokens."""
    clean = None if network.block_size is None else batch.tokens
    return Condition(label=batch.labels, clean=clean)
