"""Block-autoregressive sampling (Arriola et al., arXiv:2503.09573): block after block, each by another sampler.

Every finished block is encoded once; the context that grows so, such as keys and values, is what the next one sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    FieldError,
    Process,
    Requirement,
    Sampler,
    Samples,
    Slot,
    UnsupportedError,
    slot,
)
from dmmd_samplers.ancestral import device_of


class Block(Sampler):
    """Draws block after block with an inner sampler, whose steps are those of one block."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        inner: Slot = slot("sampler", "ancestral", help="draws one block")

    def __init__(self, config: Block.Config, *, inner: Sampler, process: Process, length: int) -> None:
        if isinstance(inner, Block):
            raise FieldError("inner", "must draw one block, got another sampler of blocks; name one for sequences")
        self.config = config
        self.inner = inner
        self.process = process
        self.length = length

    @classmethod
    def provides(cls, config: Any) -> frozenset[str]:
        """See `Component.provides`; what else the inner sampler can do, this one can."""
        return frozenset({"blocks"})

    @classmethod
    def requires(cls, config: Any) -> Sequence[Requirement]:
        """See `Component.requires`."""
        return [Requirement("backbone", "blocks", "to predict one block given those before it")]

    def prepared(self, denoiser: Denoiser) -> Denoiser:
        """See `Sampler.prepared`: the inner sampler's, which encodes what the inner sampler asks for."""
        return self.inner.prepared(denoiser)

    def step_times(self, left: Tensor) -> Tensor:
        """See `Sampler.step_times`: the inner sampler's, in every block."""
        return self.inner.step_times(left)

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        draws: Draws,
        *,
        num_steps: int,
        condition: Condition | None = None,
        last_step: bool = False,
        length: int | None = None,
    ) -> Samples:
        """See `Sampler.sample`; a length that is no multiple of the block size cuts the last block off.

        Every block is told of the fixed tokens in it and before it, and of none behind it.
        """
        denoiser = self.prepared(denoiser)
        size, length = self._block_size(denoiser), length or self.length
        condition = condition or Condition()
        finished: list[Tensor] = []
        last, context = None, None
        for start in range(0, length, size):
            here = dataclasses.replace(self._part(condition, start, size), context=context)
            if here.fixed is not None and here.values is not None and bool(here.fixed.all()):
                tokens = here.values
            else:
                is_last = last_step and start + size >= length
                drawn = self.inner.sample(
                    denoiser,
                    draws.within(f"block{start // size}"),
                    num_steps=num_steps,
                    condition=here,
                    last_step=is_last,
                    length=size,
                )
                tokens, last = drawn.tokens, drawn.last_log_probs
            finished.append(tokens)
            if start + size < length:
                context = denoiser.encode(tokens, here)
        tokens = torch.cat(finished, dim=1)[:, :length]
        return Samples(tokens, self._last_log_probs(tokens, last) if last_step else None)

    @torch.no_grad()
    def distribution(
        self, denoiser: Denoiser, *, num_steps: int, context: object | None = None, length: int | None = None
    ) -> Tensor:
        """See `Sampler.distribution`: ``p(x) = prod_i p(x^i | x^{<i})``, over all beginnings of a sequence."""
        size, length = self._block_size(denoiser), length or self.length
        if context is not None or length % size:
            raise UnsupportedError(f"only whole sequences of whole blocks of {size} tokens can be enumerated")
        device = device_of(denoiser)
        joint, sequences = torch.ones(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.int64)
        blocks = torch.cartesian_prod(*[torch.arange(self.process.vocab_size)] * size).reshape(-1, size)
        for start in range(0, length, size):
            given = torch.zeros(len(sequences), len(blocks), dtype=torch.float64)
            for row in joint.nonzero().squeeze(-1).tolist():  # what cannot be begins nothing
                before = denoiser.encode(sequences[row : row + 1].to(device)) if start else None
                given[row] = self.inner.distribution(denoiser, num_steps=num_steps, context=before, length=size)
            joint = (joint.unsqueeze(1) * given).flatten()
            sequences = torch.cat(
                (sequences.repeat_interleave(len(blocks), 0), blocks.repeat(len(sequences), 1)), dim=1
            )
        return joint

    def _block_size(self, denoiser: Denoiser) -> int:
        if denoiser.block_size is None:
            raise UnsupportedError(f"{type(denoiser).__name__} has no blocks; name a sampler of whole sequences")
        return denoiser.block_size

    def _part(self, condition: Condition, start: int, size: int) -> Condition:
        """Fixed tokens of one block; beyond the end of the sequence nothing is fixed."""
        if condition.fixed is None or condition.values is None:
            return condition
        fixed, values = (part[:, start : start + size] for part in (condition.fixed, condition.values))
        missing = size - fixed.shape[1]
        pad = torch.nn.functional.pad
        return dataclasses.replace(condition, fixed=pad(fixed, (0, missing)), values=pad(values, (0, missing)))

    def _last_log_probs(self, tokens: Tensor, last: Tensor | None) -> Tensor:
        """The last block's log-probabilities after the tokens before it, which were certain by then."""
        certain = torch.nn.functional.one_hot(tokens, self.process.vocab_size)
        if last is None:
            return certain.double().log()
        before = (tokens.shape[1] - 1) // last.shape[1] * last.shape[1]
        return torch.cat((certain[:, :before].to(last.dtype).log(), last), dim=1)[:, : tokens.shape[1]]
