"""Observes runs: terminal, log, pictures and reports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dmmd_core import Run, hookimpl


class Reporting:
    """Keeps one set of reporters per run, from the first hook to the last."""

    def __init__(self) -> None:
        self._reporters: dict[int, tuple[Any, Any]] = {}

    def _of(self, run: Run) -> tuple[Any, Any]:
        from dmmd_reporting.log import Log
        from dmmd_reporting.terminal import Terminal

        return self._reporters.setdefault(id(run), (Terminal(run), Log(run.directory / "log.jsonl")))

    @hookimpl
    def dmmd_before_run(self, run: Run) -> None:
        """Print what runs, and open the log."""
        terminal, log = self._of(run)
        log.write("start", name=run.plan.recipe.name, device=str(run.device), choices=run.choices, sizes=run.sizes)
        terminal.begin(run)

    @hookimpl
    def dmmd_after_step(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Move the progress bar and log the metrics."""
        terminal, log = self._of(run)
        log.write("step", stage=run.stage, step=step, metrics=dict(metrics))
        terminal.step(run, step, metrics)

    @hookimpl
    def dmmd_after_checkpoint(self, run: Run, step: int, path: Path) -> None:
        """Log the checkpoint."""
        self._of(run)[1].write("checkpoint", stage=run.stage, step=step, path=str(path))

    @hookimpl
    def dmmd_after_stage(self, run: Run, stage: str, results: Mapping[str, Any]) -> None:
        """Close the stage's bar; after the evaluation draw pictures and write the reports."""
        terminal, log = self._of(run)
        log.write("stage", stage=stage, results=dict(results), seconds=run.stages[stage]["seconds"])
        terminal.end_stage(run, stage)

    @hookimpl
    def dmmd_after_run(self, run: Run, error: BaseException | None) -> None:
        """Write the report of a finished run, print the closing table, close the log."""
        terminal, log = self._reporters.pop(id(run), (None, None))
        if terminal is None:
            return
        terminal.stop()
        log.write("end", error=None if error is None else f"{type(error).__name__}: {error}")
        log.close()
        if error is None:
            from dmmd_reporting.report import write_report

            write_report(run)
            terminal.closing_table(run)


_reporting = Reporting()
dmmd_before_run = _reporting.dmmd_before_run
dmmd_after_step = _reporting.dmmd_after_step
dmmd_after_checkpoint = _reporting.dmmd_after_checkpoint
dmmd_after_stage = _reporting.dmmd_after_stage
dmmd_after_run = _reporting.dmmd_after_run
