"""One attention function, two kernels: PyTorch's own (always works) and xformers (CUDA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from dmmd_core import FieldError, RunError

Kernel = Literal["auto", "sdpa", "xformers"]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with `torch.nn.functional.scaled_dot_product_attention`; ``[batch, length, heads, head_width]``."""
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return mixed.transpose(1, 2)


def xformers_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attend with `xformers.ops.memory_efficient_attention`; ``[batch, length, heads, head_width]``."""
    from xformers.ops import memory_efficient_attention

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


def choose_attention(kernel: Kernel) -> tuple[str, Attention]:
    """Pick the kernel once, at construction.

    ``auto`` takes xformers where a CUDA device is present and xformers imports, SDPA otherwise.

    Args:
        kernel: What the recipe asks for.

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
    if kernel == "auto" and torch.cuda.is_available() and xformers_problem() is None:
        return "xformers", xformers_attention
    return "sdpa", sdpa_attention
