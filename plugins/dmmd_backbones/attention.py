"""One attention function, two kernels: PyTorch's own (always works) and xformers (CUDA)."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from dmmd_core import FieldError, RunError

Kernel = Literal["auto", "sdpa", "xformers"]


class Attention(Protocol):
    """Maps queries ``[batch, length, heads, head_width]`` and as many keys and values as there are to the same shape.

    The mask, bool ``[length, keys]`` or None, says which keys a query may look at.
    """

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend."""


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with `torch.nn.functional.scaled_dot_product_attention`; ``[batch, length, heads, head_width]``."""
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return mixed.transpose(1, 2)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend with `xformers.ops.memory_efficient_attention`; ``[batch, length, heads, head_width]``, without a mask."""
    from xformers.ops import memory_efficient_attention

    assert mask is None  # blocks, which need one, are refused where the recipe is read
    if not query.is_cuda:
        raise RunError("attention xformers has no CPU kernel; set attention to sdpa or auto, or run on a CUDA device")
    return memory_efficient_attention(query, key, value)


def xformers_problem() -> str | None:
    """Say why xformers cannot be imported, or return None."""
    try:
        import xformers.ops  # noqa: F401
    except (ImportError, OSError) as error:
        return f"xformers cannot be imported ({error}); install xformers, or set attention to sdpa"
    return None


def choose_attention(kernel: Kernel, *, masked: bool = False) -> tuple[str, Attention]:
    """Pick the kernel once, at construction.

    ``auto`` takes xformers where a CUDA device is present and xformers imports, SDPA otherwise and for masks.

    Args:
        kernel: What the recipe asks for.
        masked: Whether it will be called with a mask.

    Returns:
        The kernel's name, for the log, and the function.

    Raises:
        FieldError: xformers was asked for by name and is not installed.
    """
    if kernel == "xformers":
        problem = xformers_problem()
        if problem:
            raise FieldError("attention", problem)
        return "xformers", xformers_attention
    if kernel == "auto" and not masked and torch.cuda.is_available() and xformers_problem() is None:
        return "xformers", xformers_attention
    return "sdpa", sdpa_attention
