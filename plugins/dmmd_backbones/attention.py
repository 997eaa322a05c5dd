"""One attention function, two kernels: PyTorch's own (always works) and xformers (CUDA).

What xformers refuses, ``auto`` gives to PyTorch's own kernel and ``xformers`` by name is an error: masks, heads whose
width is no multiple of 8, a build that has no kernel for this device, and a model on a CPU.
"""

from __future__ import annotations

import functools
from typing import Literal, Protocol

import torch
from torch import Tensor

from dmmd_core import FieldError, RunError

Kernel = Literal["auto", "sdpa", "xformers"]
_ALIGNMENT = 8  # elements: what its bfloat16 kernels need of a head's width


class Attention(Protocol):
    """Maps queries ``[batch, length, heads, head_width]``, and keys and values of any length, to the queries' shape."""

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[batch, length, heads, head_width]``.
            key: ``[batch, keys, heads, head_width]``.
            value: ``[batch, keys, heads, head_width]``.
            mask: Which keys a query may look at, bool ``[length, keys]`` or what broadcasts to
                ``[batch, heads, length, keys]``; None for all.
            dropout: Probability of dropping an attention weight; 0 outside training.
        """


def sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Attend with `torch.nn.functional.scaled_dot_product_attention`; see `Attention`."""
    mixed = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, dropout_p=dropout
    )
    return mixed.transpose(1, 2)


def xformers_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Attend with `xformers.ops.memory_efficient_attention`, without a mask; see `Attention`."""
    from xformers.ops import memory_efficient_attention

    if mask is not None:
        raise RunError("attention xformers takes no mask here; set attention to sdpa or auto")
    if not query.is_cuda:
        raise RunError("attention xformers has no CPU kernel; set attention to sdpa or auto, or run on a CUDA device")
    return memory_efficient_attention(query, key, value, p=dropout)


def xformers_or_sdpa_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0
) -> Tensor:
    """Attend with xformers on a CUDA device and with PyTorch's own kernel elsewhere; see `Attention`."""
    attend = xformers_attention if query.is_cuda else sdpa_attention
    return attend(query, key, value, mask, dropout=dropout)


def xformers_problem(head_width: int | None = None) -> str | None:
    """Say why xformers cannot attend with heads of this width, or return None.

    Where a CUDA device is present, its kernel is tried once on a few zeros, forwards and backwards.
    """
    try:
        import xformers.ops  # noqa: F401
    except (ImportError, OSError) as error:
        return f"xformers cannot be imported ({error}); install xformers, or set attention to sdpa"
    if head_width is not None and head_width % _ALIGNMENT:
        return (
            f"xformers needs heads whose width is a multiple of {_ALIGNMENT}, got {head_width}; choose another number "
            "of heads, or set attention to sdpa"
        )
    return _kernel_problem(head_width or _ALIGNMENT) if torch.cuda.is_available() else None


@functools.cache
def _kernel_problem(head_width: int) -> str | None:
    with torch.enable_grad(), torch.autocast("cuda", enabled=False):
        shape = (1, _ALIGNMENT, 1, head_width)
        zeros = torch.zeros(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        try:
            xformers_attention(zeros, zeros, zeros).sum().backward()
        except (NotImplementedError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            return f"xformers has no kernel that works on this device ({reason}); set attention to sdpa"
    return None


def choose_attention(kernel: Kernel, *, head_width: int | None = None, masked: bool = False) -> tuple[str, Attention]:
    """Pick the kernel once, at construction.

    ``auto`` takes xformers where a CUDA device is present and xformers can do what is asked, SDPA otherwise; a model
    that is then put on a CPU all the same attends with SDPA.

    Args:
        kernel: What the recipe asks for.
        head_width: Width of a head.
        masked: Whether it will be called with a mask.

    Returns:
        The kernel's name, for the log, and the function.

    Raises:
        FieldError: xformers was asked for by name and cannot do it.
    """
    if kernel == "sdpa" or (kernel == "auto" and not torch.cuda.is_available()):
        return "sdpa", sdpa_attention
    problem = "xformers takes no mask here; set attention to sdpa or auto" if masked else xformers_problem(head_width)
    if kernel == "xformers":
        if problem:
            raise FieldError("attention", problem)
        return "xformers", xformers_attention
    return ("sdpa", sdpa_attention) if problem else ("xformers on CUDA", xformers_or_sdpa_attention)
