"""``python -m dmmd_core RECIPE``: the same as ``dmmd-run``, for ``torchrun``."""

from dmmd_core.cli import run_command

if __name__ == "__main__":
    raise SystemExit(run_command())
