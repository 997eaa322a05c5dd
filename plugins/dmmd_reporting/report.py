"""``report.md`` and ``report.html``: figures, plots, samples side by side, recipe and versions."""

from __future__ import annotations

import base64
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dmmd_core import Codec, Run
from dmmd_core.checkpoint import write_text
from dmmd_core.media import image_grid, write_png
from dmmd_reporting.log import loss_curves
from dmmd_reporting.plots import plot_losses, plot_quality
from dmmd_reporting.summary import summarize

_TILES = 36
_COLUMNS = 6
_LINES = 12


@dataclass(frozen=True)
class Exhibit:
    """Samples to look at: a picture, or lines of text.

    Attributes:
        title: What it shows.
        picture: PNG relative to the run directory, or None.
        lines: Text samples.
    """

    title: str
    picture: str | None
    lines: list[str]


def write_report(run: Run) -> None:
    """Draw all pictures of a finished run and write both reports."""
    plots = run.directory / "plots"
    plots.mkdir(exist_ok=True)
    results = run.metrics["results"]
    summary = summarize(results)
    quality = [
        f"plots/{metric}.png" for metric in summary.columns if plot_quality(results, metric, plots / f"{metric}.png")
    ]
    losses = [
        f"plots/loss_{stage}.png"
        for stage, curves in loss_curves(run.directory / "log.jsonl").items()
        if plot_losses(curves, stage, plots / f"loss_{stage}.png")
    ]
    context = {
        "name": run.plan.recipe.name,
        "summary": summary,
        "student_steps": run.plan.recipe.distill.num_steps,
        "quality": quality,
        "losses": losses,
        "exhibits": _exhibits(run),
        "facts": run.metrics["facts"],
        "timing": {n: s for n, s in run.metrics["timing"].items() if not isinstance(s, dict)},
        "machine": _machine(run),
        "references": sorted({row["reference"] for row in results if row["reference"]}),
        "recipe": (run.directory / "recipe.yaml").read_text(encoding="utf-8"),
        "versions": json.loads((run.directory / "plugins.json").read_text(encoding="utf-8")),
    }
    write_text(run.directory / "report.md", _render("report.md.jinja", context, run.directory))
    write_text(run.directory / "report.html", _render("report.html.jinja", context, run.directory))


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
    return environment.get_template(template).render(context)


def _embed(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _machine(run: Run) -> dict[str, str]:
    return {
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU",
        "CPU cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "precision": str(run.precision).removeprefix("torch."),
        "Python": platform.python_version(),
        **run.choices,
    }


def _exhibits(run: Run) -> list[Exhibit]:
    """Real data, then teacher and student at every number of steps."""
    codec = run.assembly.data.codec
    exhibits = []
    originals = run.assembly.data.originals("test")
    if originals is not None:
        exhibits.append(_picture(run, "real held-out images", "real", originals[:_TILES]))
    evaluate = run.plan.recipe.evaluate
    jobs = [("test", 0)] + [("teacher", k) for k in evaluate.teacher_steps]
    jobs += [("student", k) for k in evaluate.student_steps]
    for model, steps in jobs:
        batch = run.samples(model, steps)
        if batch is None:
            continue
        plural = "" if steps == 1 else "s"
        title = f"{model}, {steps} step{plural}" if steps else "held-out images through the codec"
        exhibits.append(_exhibit(run, codec, title, f"{model}_{steps}", batch.tokens))
    return exhibits


def _exhibit(run: Run, codec: Codec, title: str, name: str, tokens: torch.Tensor) -> Exhibit:
    if codec.media == "image":
        return _picture(run, title, name, codec.decode(tokens[:_TILES]))
    shown = codec.decode(tokens[:_LINES])
    lines = shown if codec.media == "text" else [" ".join(map(str, row)) for row in shown.tolist()]
    return Exhibit(title.replace("images through the codec", "data"), None, list(lines))


def _picture(run: Run, title: str, name: str, images: torch.Tensor) -> Exhibit:
    path = f"samples/{name}.png"
    write_png(image_grid(images, columns=_COLUMNS, tile=48), run.directory / path)
    return Exhibit(title, path, [])
