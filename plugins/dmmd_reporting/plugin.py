"""Observes runs: terminal, log, pictures and reports."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from dmmd_core import RunError, hookimpl

if TYPE_CHECKING:
    from dmmd_core import Run
    from dmmd_reporting.log import Log
    from dmmd_reporting.terminal import Terminal


class Reporting:
    """Keeps one terminal and one log per run, from the first hook to the last."""

    def __init__(self) -> None:
        self._reporters: WeakKeyDictionary[Run, tuple[Terminal, Log]] = WeakKeyDictionary()

    @hookimpl
    def dmmd_before_run(self, run: Run) -> None:
        """Print what runs, and open the log."""
        from dmmd_reporting.log import Log
        from dmmd_reporting.terminal import Terminal

        terminal, log = self._reporters[run] = Terminal(run), Log(run.directory / "log.jsonl")
        log.start(run)
        terminal.begin(run)

    @hookimpl
    def dmmd_after_step(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Move the progress bar and log the metrics."""
        terminal, log = self._reporters[run]
        log.write("step", stage=run.stage, step=step, metrics=dict(metrics))
        terminal.step(run, step, metrics)

    @hookimpl
    def dmmd_after_checkpoint(self, run: Run, step: int, path: Path) -> None:
        """Log the checkpoint."""
        self._reporters[run][1].write("checkpoint", stage=run.stage, step=step, path=str(path))

    @hookimpl
    def dmmd_on_warning(self, run: Run, step: int, message: str) -> None:
        """Log the warning; the terminal has shown it."""
        self._reporters[run][1].write("warning", stage=run.stage, step=step, message=message)

    @hookimpl
    def dmmd_after_stage(self, run: Run, stage: str, results: Mapping[str, Any]) -> None:
        """Close the stage's bar; after the evaluation draw pictures and write the reports."""
        terminal, log = self._reporters[run]
        log.write("stage", stage=stage, results=dict(results), seconds=run.stages[stage]["seconds"])
        terminal.end_stage(run, stage)
        if stage == "evaluate":
            self._report(run)

    @hookimpl
    def dmmd_after_run(self, run: Run, error: BaseException | None) -> None:
        """Close bar and log; where the run finished, see that there is a report and print the closing table."""
        reporters = self._reporters.pop(run, None)
        if reporters is None:
            return
        terminal, log = reporters
        terminal.stop()
        # After an error, which may be a full disk, that is what must be told.
        with suppress(RunError) if error else nullcontext():
            log.write("end", error=None if error is None else f"{type(error).__name__}: {error}")
        log.close()
        if error is None:
            if not all((run.directory / name).exists() for name in ("report.md", "report.html")):
                self._report(run)
            if not run.quiet:
                terminal.closing_table(run)

    def _report(self, run: Run) -> None:
        from dmmd_reporting.report import write_report

        write_report(run)


_reporting = Reporting()
dmmd_before_run = _reporting.dmmd_before_run
dmmd_after_step = _reporting.dmmd_after_step
dmmd_after_checkpoint = _reporting.dmmd_after_checkpoint
dmmd_on_warning = _reporting.dmmd_on_warning
dmmd_after_stage = _reporting.dmmd_after_stage
dmmd_after_run = _reporting.dmmd_after_run
