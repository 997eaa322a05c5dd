"""Progress with rate and ETA in the terminal, and the closing table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from dmmd_core import in_notebook, is_circumstance
from dmmd_reporting.rate import Rate, clock, rate_text
from dmmd_reporting.summary import Summary, summarize

if TYPE_CHECKING:
    from dmmd_core import Run

_PLAIN_INTERVAL_S = 15.0
_PLAIN_WIDTH = 120
_LABEL_WIDTH, _COLUMN_WIDTH = 24, 16
_METRICS_SHOWN = 3


class Terminal:
    """A progress bar on a terminal or in a notebook, a line now and then elsewhere.

    Args:
        run: Its messages are shown without tearing the bar.
        console: Where to print; standard error by default.
        seconds: The clock.
    """

    def __init__(
        self, run: Run, console: Console | None = None, *, seconds: Callable[[], float] = time.monotonic
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False, quiet=run.quiet)
        self._seconds = seconds
        self._progress: Progress | None = None
        self._task: Any = None
        self._line: tqdm[Any] | None = None  # a notebook shows a line that is drawn over, and no cursor that moves up
        self._stage = ""
        self._rate = Rate(0)
        self._printed_s = 0.0
        # Where a stage goes on from an earlier run, the first report does not tell how far this run has come.
        self._going_on = {path.name for path in (run.directory / "checkpoints").glob("*")}
        if run.metrics["results"]:
            self._going_on.add("evaluate")
        self._free_since_s = seconds()
        run.say = self.say

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, run: Run) -> None:
        """Print what runs and where."""
        dtype = str(run.precision).removeprefix("torch.")
        sizes = ", ".join(f"{name} {size:,}" for name, size in run.sizes.items())
        self.say(f"{run.plan.recipe.name}: {run.directory}")
        self.say("  " + ", ".join([f"{run.device} in {dtype}", *(f"{k} {v}" for k, v in run.choices.items())]))
        self.say(f"  parameters: {sizes}")
        if run.stages:
            self.say(f"  finished before: {', '.join(run.stages)}")

    def step(self, run: Run, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step."""
        now = self._seconds()
        first = run.stage != self._stage
        if first:
            self._open(run, step)
        self._rate.report(step, now)
        last = step == run.stage_steps
        learned = [(name, value) for name, value in metrics.items() if not is_circumstance(name)]
        text = "  ".join(f"{name} {value:.4g}" for name, value in learned[:_METRICS_SHOWN])
        speed, left = rate_text(self._rate.per_second), clock(self._rate.remaining_s)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, speed=f"{speed}  ETA {left}", metrics=text)
        elif self._line is not None:
            self._line.set_postfix_str(text, refresh=False)
            self._line.update(step - self._line.n)
        elif first or last or now - self._printed_s >= _PLAIN_INTERVAL_S:
            self._printed_s = now
            self.say(f"{run.stage}: {step}/{run.stage_steps}  {speed}  ETA {left}  {text}")

    def end_stage(self, run: Run, stage: str) -> None:
        """Say how long a stage took."""
        self.stop()
        self._free_since_s = self._seconds()
        self.say(f"{stage}: done in {clock(run.stages[stage]['seconds'])}")

    def stop(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        if self._line is not None:
            self._line.close()
            self._line = None

    def closing_table(self, run: Run, console: Console | None = None) -> None:
        """Print all figures and where the report is, to standard output."""
        console = console or Console(file=sys.stdout, highlight=False)
        if not console.is_terminal:
            console.width = max(console.width, _PLAIN_WIDTH)
        summary = summarize(run.metrics["results"])
        for table in _tables(summary, run.plan.recipe.name, console.width):
            console.print(table)
        if any(cell.best for row in summary.rows for cell in row.cells):
            console.print("* best student")
        times = ", ".join(f"{n} {clock(s)}" for n, s in run.metrics["timing"].items() if not isinstance(s, dict))
        for line in (f"time: {times}", *(f"report: {run.directory / name}" for name in ("report.html", "report.md"))):
            console.print(line, markup=False, soft_wrap=True)

    def _open(self, run: Run, step: int) -> None:
        self.stop()
        self._stage, self._rate = run.stage, Rate(run.stage_steps)
        if run.stage not in self._going_on:
            self._rate.report(0, self._free_since_s)
        if in_notebook() and not run.quiet:
            self._line = tqdm(total=run.stage_steps, initial=step, desc=run.stage, unit=" steps", mininterval=1.0)
        if not self.console.is_interactive:
            return
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("{task.fields[metrics]}", markup=False),
            console=self.console,
            transient=True,
            refresh_per_second=4,
        )
        self._progress.start()
        self._task = self._progress.add_task(run.stage, total=run.stage_steps, completed=step, speed="", metrics="")


def _tables(summary: Summary, title: str, width: int) -> Iterator[Table]:
    """Yield one table, or several below each other where the metrics do not fit beside each other."""
    at_once = max(1, (width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    for start in range(0, len(summary.columns), at_once):
        shown = slice(start, start + at_once)
        table = Table(title=Text(title) if start == 0 else None, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("model", no_wrap=True)
        table.add_column("steps", justify="right", no_wrap=True)
        for column in summary.columns[shown]:
            table.add_column(Text(column.replace("_", "\n")), justify="right", no_wrap=True, vertical="bottom")
        for row in summary.rows:
            cells = [
                Text(f"{cell.text} *", style="bold") if cell.best else Text(f"{cell.text}  ")
                for cell in row.cells[shown]
            ]
            table.add_row(row.label, str(row.num_steps or ""), *cells)
        yield table
