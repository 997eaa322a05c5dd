"""How many processes work on a run; one for now, and more are refused rather than ignored."""

from __future__ import annotations

import os

from dmmd_core.errors import RunError


def require_single_process() -> None:
    """Refuse to start as one of several processes.

    Raises:
        RunError: ``torchrun`` started more than one.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise RunError(f"this version runs in a single process, but WORLD_SIZE is {size}; start dmmd-run directly")
