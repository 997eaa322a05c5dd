"""Plots of a run, drawn without touching matplotlib's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_COLORS = {"teacher": "#7a7a7a", "student": "#d1495b", "test": "#2e6f95", "train": "#66a182"}


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
    rows = [row for row in results if row["metric"] == metric]
    if not any(row["num_steps"] for row in rows):
        return False
    figure = _figure(5.4, 3.6)
    axes = figure.add_subplot()
    for model in ("teacher", "student"):
        points = sorted((row for row in rows if row["model"] == model), key=lambda row: row["num_steps"])
        if points:
            axes.errorbar(
                [row["num_steps"] for row in points],
                [row["value"] for row in points],
                yerr=[row["standard_error"] or 0.0 for row in points],
                marker="o",
                capsize=2,
                label=model,
                color=_COLORS[model],
            )
    for row in rows:
        if row["model"] == "test":
            axes.axhline(row["value"], linestyle="--", color=_COLORS["test"], label="held-out data")
    steps = sorted({row["num_steps"] for row in rows if row["num_steps"]})
    axes.set_xscale("log", base=2)
    axes.set_xticks(steps, [str(count) for count in steps])
    axes.minorticks_off()
    values = [row["value"] for row in rows if row["num_steps"]]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return True


def plot_losses(curves: Mapping[str, Mapping[int, float]], stage: str, path: Path) -> bool:
    """Draw the curves of one stage side by side; says whether there was anything to draw."""
    shown = {name: curve for name, curve in curves.items() if name != "learning_rate" and len(curve) > 1}
    if not shown:
        return False
    figure = _figure(3.2 * len(shown), 2.6)
    for place, (name, curve) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), place)
        steps = sorted(curve)
        axes.plot(steps, [curve[step] for step in steps], color=_COLORS["student"], linewidth=0.9)
        axes.set_title(f"{stage}: {name.replace('_', ' ')}", fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    figure.savefig(path, dpi=130)
    return True
