"""The table of all figures, for terminal and reports alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LABELS = {"train": "training data", "test": "held-out data", "teacher": "teacher", "student": "student"}


@dataclass(frozen=True)
class Cell:
    """One figure as text; `best` marks the best student."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """One model at one number of steps."""

    model: str
    label: str
    num_steps: int
    trained: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Summary:
    """All rows, with one column per metric."""

    columns: list[str]
    rows: list[Row]


def summarize(results: Sequence[dict[str, Any]]) -> Summary:
    """Arrange the rows of ``metrics.json`` by model and metric."""
    results = _told_apart(results)
    columns = list(dict.fromkeys(row["metric"] for row in results))
    keys = list(dict.fromkeys((row["model"], row["num_steps"]) for row in results))
    found = {(row["model"], row["num_steps"], row["metric"]): row for row in results}
    best = {column: _best_student(results, column) for column in columns}
    rows = []
    for model, steps in keys:
        cells = []
        for column in columns:
            row = found.get((model, steps, column))
            text = "" if row is None else format_value(row["value"], row["standard_error"])
            cells.append(Cell(text, model == "student" and steps == best[column]))
        trained = any(r["trained_num_steps"] == steps for r in results if r["model"] == model)
        rows.append(Row(model, LABELS.get(model, model), steps, trained, cells))
    return Summary(columns, rows)


def format_value(value: float, standard_error: float | None) -> str:
    """Write a figure with four significant digits, and its standard error where there is one."""
    text = f"{value:.4g}"
    return text if standard_error is None else f"{text} ± {standard_error:.1g}"


def _told_apart(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Name the reference beside a metric that judged a model at one number of steps more than once."""
    counts = Counter((row["metric"], row["model"], row["num_steps"]) for row in results)
    several = {metric for (metric, _, _), count in counts.items() if count > 1}
    return [
        {**row, "metric": f"{row['metric']} ({row['reference']})"} if row["metric"] in several else row
        for row in results
    ]


def _best_student(results: Sequence[dict[str, Any]], column: str) -> int | None:
    rows = [row for row in results if row["model"] == "student" and row["metric"] == column]
    rows = [row for row in rows if not math.isnan(row["value"])]
    if len(rows) < 2 or rows[0]["lower_is_better"] is None:
        return None
    sign = 1 if rows[0]["lower_is_better"] else -1
    best = min(rows, key=lambda row: sign * row["value"])
    return int(best["num_steps"])
