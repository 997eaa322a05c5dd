"""Plots of a run, drawn without touching matplotlib's global state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLORS = {"teacher": "#6b6b6b", "student": "#d1495b", "test": "#2e6f95", "train": "#66a182"}
_YARDSTICKS = {"test": ("--", "held-out data"), "train": (":", "training data")}
_LEGEND = ("teacher", "student", "student as trained", "held-out data", "training data")
_DPI = 150


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def plot_quality(results: Sequence[dict[str, Any]], metric: str, path: Path) -> bool:
    """Draw one metric against the number of steps for teacher and student; says whether there was anything to draw.

    Args:
        results: Rows of ``metrics.json``.
        metric: Which one.
        path: PNG to write.
    """
    rows = [row for row in results if row["metric"] == metric and math.isfinite(row["value"])]
    if not any(row["num_steps"] for row in rows):
        return False
    figure = _figure(5.4, 3.6)
    axes = figure.add_subplot()
    for model in ("teacher", "student"):
        _curve(axes, sorted((row for row in rows if row["model"] == model), key=lambda row: row["num_steps"]), model)
    for row in rows:
        if row["model"] in _YARDSTICKS:
            style, label = _YARDSTICKS[row["model"]]
            axes.axhline(row["value"], linestyle=style, color=_COLORS[row["model"]], label=label, zorder=1)
    _step_axis(axes, sorted({row["num_steps"] for row in rows if row["num_steps"]}))
    if _spans_decades([row["value"] for row in rows]):
        _log_axis(axes)
    axes.set_title(_title(rows[0]), fontsize=10, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _legend(axes)
    figure.savefig(path, dpi=_DPI)
    return True


def plot_training(curve: Mapping[int, float], title: str, path: Path) -> bool:
    """Draw one training metric, step to value; says whether there was anything to draw."""
    if len(curve) < 2:
        return False
    figure = _figure(3.6, 2.4)
    axes = figure.add_subplot()
    steps = sorted(curve)
    axes.plot(steps, [curve[step] for step in steps], color=_COLORS["student"], linewidth=0.9)
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=_DPI)
    return True


def _curve(axes: Any, points: Sequence[dict[str, Any]], model: str) -> None:
    if not points:
        return
    style = {"color": _COLORS[model], "marker": "o", "markersize": 4.5, "linewidth": 1.6, "zorder": 3}
    steps, values = [row["num_steps"] for row in points], [row["value"] for row in points]
    errors = [row["standard_error"] or 0.0 for row in points]
    axes.errorbar(steps, values, yerr=errors if any(errors) else None, capsize=3, label=model, **style)
    trained = [row for row in points if row["trained_num_steps"] == row["num_steps"]]
    if trained:
        steps, values = [row["num_steps"] for row in trained], [row["value"] for row in trained]
        ring = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "color": _COLORS[model], "zorder": 4}
        axes.plot(steps, values, linestyle="none", label=f"{model} as trained", **ring)


def _step_axis(axes: Any, steps: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xlim(steps[0] / 1.4, steps[-1] * 1.4)
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    axes.set_xlabel("sampling steps")


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", left=False, labelleft=False)


def _legend(axes: Any) -> None:
    handles, labels = axes.get_legend_handles_labels()
    by_label = dict(zip(labels, handles, strict=True))
    names = [name for name in _LEGEND if name in by_label]
    axes.legend([by_label[name] for name in names], names, frameon=False, fontsize=8)


def _spans_decades(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) > 20 * min(values)


def _title(row: Mapping[str, Any]) -> str:
    better = {True: " (lower is better)", False: " (higher is better)", None: ""}[row["lower_is_better"]]
    return f"{row['metric'].replace('_', ' ')}{better}"
