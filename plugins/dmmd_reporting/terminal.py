"""Progress with rate and ETA in the terminal, and the closing table."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dmmd_core import Run
from dmmd_reporting.summary import Summary, summarize

_PLAIN_INTERVAL_S = 15.0


class Terminal:
    """A progress bar on a terminal, a line now and then elsewhere.

    Args:
        run: Its messages are shown without tearing the bar.
        console: Where to print; standard error by default.
    """

    def __init__(self, run: Run, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._progress: Progress | None = None
        self._task: Any = None
        self._stage = ""
        self._first: tuple[int, float] = (0, 0.0)
        self._printed = 0.0
        run.say = lambda text: self.console.print(text, markup=False)

    def begin(self, run: Run) -> None:
        """Print what runs and where."""
        choices = "".join(f", {name} {value}" for name, value in run.choices.items())
        dtype = str(run.precision).removeprefix("torch.")
        self.console.print(
            f"{run.plan.recipe.name}: {run.sizes['student']:,} parameters on {run.device} in {dtype}{choices}; "
            f"directory {run.directory}",
            markup=False,
        )
        self._started = time.monotonic()

    def step(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step."""
        now = time.monotonic()
        if run.stage != self._stage:
            self._stage, self._first, self._printed = run.stage, (step, now), now
            self._open_bar(run)
        done, since = step - self._first[0], now - self._first[1]
        rate = done / since if since > 0 and done else 0.0
        text = "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:3])
        if self._progress is not None:
            self._progress.update(self._task, completed=step, rate=f"{rate:.1f}/s" if rate else "", metrics=text)
            return
        last = step == run.stage_steps
        if last or now - self._printed >= _PLAIN_INTERVAL_S:
            self._printed = now
            left = (run.stage_steps - step) / rate if rate else 0.0
            self.console.print(
                f"{run.stage}: {step}/{run.stage_steps}  {rate:.1f}/s  ETA {_clock(left)}  {text}",
                markup=False,
                soft_wrap=True,
            )

    def end_stage(self, run: Run, stage: str) -> None:
        """Say how long a stage took."""
        self.stop()
        seconds = run.stages[stage]["seconds"]
        if stage != "data":
            self.console.print(f"{stage}: done in {_clock(seconds)}", markup=False)

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def closing_table(self, run: Run) -> None:
        """Print all figures and where the report is, to standard output."""
        console = Console(file=sys.stdout, highlight=False)
        summary = summarize(run.metrics["results"])
        console.print(_table(summary, run.plan.recipe.name))
        times = ", ".join(f"{n} {_clock(s)}" for n, s in run.metrics["timing"].items() if not isinstance(s, dict))
        console.print(f"time: {times}", markup=False)
        console.print(f"report: {run.directory / 'report.html'}", markup=False, soft_wrap=True)

    def _open_bar(self, run: Run) -> None:
        self.stop()
        if not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[metrics]}"),
            console=self.console,
            transient=True,
        )
        self._progress.start()
        self._task = self._progress.add_task(run.stage, total=run.stage_steps, rate="", metrics="")


def _table(summary: Summary, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    for column in summary.columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    for row in summary.rows:
        cells = [f"[bold]{cell.text}[/bold]" if cell.best else cell.text for cell in row.cells]
        table.add_row(row.label, str(row.num_steps or ""), *cells)
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
