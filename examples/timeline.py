"""Observer: writes ``timeline.csv`` into the run directory, one line for whatever happens to a run.

It registers no component; with ``--plugin examples/timeline.py`` it watches any run. A run that is resumed goes on in
the same file.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmmd_core import Run, hookimpl


def note(run: Run, event: str, step: int | str = "", detail: str = "") -> None:
    """Append a line: time of day in seconds, stage, event, step, detail."""
    with (run.directory / "timeline.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow([f"{time.time():.3f}", run.stage, event, step, detail])


@hookimpl
def dmmd_before_run(run: Run) -> None:
    """Note the beginning."""
    note(run, "begin", detail=run.plan.recipe.name)


@hookimpl
def dmmd_after_step(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Note the step and what was measured; figures of the evaluation come here, too."""
    note(run, "step", step, " ".join(f"{name}={value:.6g}" for name, value in metrics.items()))


@hookimpl
def dmmd_after_checkpoint(run: Run, step: int, path: Path) -> None:
    """Note the checkpoint."""
    note(run, "checkpoint", step, path.name)


@hookimpl
def dmmd_on_warning(run: Run, step: int, message: str) -> None:
    """Note the warning."""
    note(run, "warning", step, message)


@hookimpl
def dmmd_after_stage(run: Run, stage: str, results: Mapping[str, Any]) -> None:
    """Note how long the stage took."""
    note(run, "stage", detail=f"{run.stages[stage]['seconds']:.3f} s")


@hookimpl
def dmmd_after_run(run: Run, error: BaseException | None) -> None:
    """Note the end, and what ended the run early."""
    note(run, "end", detail="" if error is None else f"{type(error).__name__}: {error}")
