"""What is done to a network's units (`Backbone.units`) before it is trained: compiled, and computed again backwards."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmmd_core.interfaces import Backbone


def units_of(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the units of every backbone within a module, each once."""
    seen: set[int] = set()
    for part in module.modules():
        for unit in part.units() if isinstance(part, Backbone) else ():
            if id(unit) not in seen:
                seen.add(id(unit))
                yield unit


def compile_units(module: nn.Module) -> None:
    """Compile every unit in place with `torch.compile`; names of weights stay as they are, and copies are not compiled.

    A unit is compiled when it is first called, and again for another shape, precision or gradient mode.
    """
    for unit in units_of(module):
        if unit._compiled_call_impl is None:
            unit.compile()


def checkpoint_units(module: nn.Module) -> None:
    """Let every unit keep its inputs alone, and compute its activations again in the backward pass.

    Chen et al., arXiv:1604.06174. Copies of the module do the same; dropout draws the same masks again.
    """
    for unit in units_of(module):
        if "forward" not in vars(unit):
            unit.forward = functools.partial(_recomputed, unit.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compiler_problem(device: torch.device) -> str | None:
    """Say why `torch.compile` cannot work for a device, or return None."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return None if has_triton() else "needs Triton, which is not there or cannot use this GPU; install triton"
    if any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        return None
    return "needs a C++ compiler on a CPU, and neither g++ nor clang++ is found; install one, or set CXX"
