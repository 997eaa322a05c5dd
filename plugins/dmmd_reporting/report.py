"""``report.md`` and ``report.html``: figures, plots, samples side by side, recipe and versions."""

from __future__ import annotations

import base64
import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmmd_core import is_circumstance
from dmmd_core.checkpoint import write_text
from dmmd_reporting.log import loss_curves, time_shares
from dmmd_reporting.pictures import draw_exhibits
from dmmd_reporting.plots import plot_quality, plot_training
from dmmd_reporting.summary import format_value, summarize

if TYPE_CHECKING:
    from dmmd_core import Run

Curves = Mapping[str, Mapping[str, Mapping[int, float]]]
_PROVENANCE = ("num_samples", "reference", "sampler", "dtype", "ema", "seed")


def write_report(run: Run) -> None:
    """Draw all pictures of an evaluated run and write both reports."""
    results = run.metrics["results"]
    summary = summarize(results)
    versions = json.loads((run.directory / "plugins.json").read_text(encoding="utf-8"))
    timing = run.metrics["timing"]
    curves = loss_curves(run.directory / "log.jsonl")
    context = {
        "name": run.plan.recipe.name,
        "summary": summary,
        "student_steps": run.plan.recipe.distill.num_steps,
        "quality": _quality_plots(run),
        "training": _training_plots(run, curves),
        "exhibits": draw_exhibits(run),
        "figures": [_figure(row) for row in results],
        "provenance": [name.replace("_", " ").replace("num ", "") for name in _PROVENANCE],
        "facts": {name.replace("_", " "): _fact(value) for name, value in run.metrics["facts"].items()},
        "timing": {name: seconds for name, seconds in timing.items() if not isinstance(seconds, dict)},
        "sampling": {_sampled(name): seconds for name, seconds in timing.get("sampling", {}).items()},
        "shares": _shares(time_shares(curves)),
        "usage": _usage(curves),
        "machine": _machine(run),
        "references": sorted({row["reference"] for row in results if row["reference"]}),
        "recipe": (run.directory / "recipe.yaml").read_text(encoding="utf-8").rstrip(),
        "versions": versions,
    }
    write_text(run.directory / "report.md", _render("report.md.jinja", context, run.directory))
    write_text(run.directory / "report.html", _render("report.html.jinja", context, run.directory))


def _quality_plots(run: Run) -> dict[str, str]:
    """Draw every metric; returns description to path within the run directory."""
    results = run.metrics["results"]
    drawn = {}
    for metric in dict.fromkeys(row["metric"] for row in results):
        path = f"plots/{_file_name(metric)}.png"
        if plot_quality(results, metric, _ready(run.directory / path)):
            drawn[f"{metric.replace('_', ' ')} against sampling steps"] = path
    return drawn


def _training_plots(run: Run, curves_by_stage: Curves) -> dict[str, str]:
    """Draw every training metric of every stage; returns description to path within the run directory."""
    drawn = {}
    for stage, curves in curves_by_stage.items():
        for metric, curve in curves.items():
            title = f"{stage}: {metric.replace('_', ' ')}"
            path = f"plots/training_{_file_name(stage)}_{_file_name(metric)}.png"
            if not is_circumstance(metric) and plot_training(curve, title, _ready(run.directory / path)):
                drawn[title] = path
    return drawn


def _shares(shares: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Table of where the time went: a head, then a row a part; a column a stage."""
    parts = sorted(dict.fromkeys(part for found in shares.values() for part in found), key=lambda part: part == "rest")
    rows = [[part, *(f"{found[part]:.1%}" if part in found else "" for found in shares.values())] for part in parts]
    return [["part", *shares], *rows] if rows else []


def _usage(curves: Curves) -> dict[str, str]:
    """Throughput of every stage at its last log line, and the most memory that was used."""
    told = {}
    for stage, metrics in curves.items():
        for name, curve in metrics.items():
            if name.endswith("_per_second"):
                told[f"{stage}: {name.replace('_', ' ')}"] = f"{curve[max(curve)]:.4g}"
            elif name.endswith("_gib"):
                told[name.replace("_gib", "").replace("_", " ")] = f"{curve[max(curve)]:.3g} GiB"
    return told


def _figure(row: dict[str, Any]) -> list[str]:
    """One row of the table of all figures: model, steps, metric, value, then where it comes from."""
    value = format_value(row["value"], row["standard_error"])
    known = ["" if row[name] is None else str(row[name]) for name in _PROVENANCE]
    return [row["model"], str(row["num_steps"] or ""), row["metric"].replace("_", " "), value, *known]


def _sampled(name: str) -> str:
    model, steps = name.rsplit("_", 1)
    return f"sampling, {model}, {steps} step{'' if steps == '1' else 's'}"


def _fact(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _machine(run: Run) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU",
        "CPU cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "precision": str(run.precision).removeprefix("torch."),
        "Python": platform.python_version(),
        **run.choices,
    }


def _render(template: str, context: dict[str, Any], directory: Path) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.jinja"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals["embed"] = lambda path: _embed(directory / path)
    environment.filters["md"] = _markdown
    environment.filters["fence"] = _fence
    return environment.get_template(template).render(context)


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _markdown(text: object) -> str:
    """Make text harmless in a line or a table of Markdown."""
    plain = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)


def _fence(text: str | Sequence[str]) -> str:
    """Put text between fences longer than any run of backticks in it."""
    body = text if isinstance(text, str) else "\n".join(text)
    longest = max((len(found) for found in re.findall(r"`+", body)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{body}\n{fence}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text)


def _ready(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    return path
