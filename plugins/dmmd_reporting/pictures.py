"""Samples to look at: PNG grids of images, text files of everything else, in ``samples/``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dmmd_core.media import image_grid, write_png
from dmmd_reporting.nearest import beside_each_other, nearest_training_images

if TYPE_CHECKING:
    from dmmd_core import Run

_SMALL_PIXELS = 64
_SMALL_COLUMNS, _LARGE_COLUMNS = 6, 4
_TILE_PIXELS = 48
_PAIRS = 18
_LINES_KEPT, _LINES_SHOWN = 64, 12


@dataclass(frozen=True)
class Exhibit:
    """Samples of one model.

    Attributes:
        title: What it shows.
        picture: PNG relative to the run directory, or None.
        lines: Text samples.
    """

    title: str
    picture: str | None
    lines: list[str]


def draw_exhibits(run: Run) -> list[Exhibit]:
    """Write real data, then teacher and student at every number of steps, as far as their samples were kept."""
    exhibits = []
    data = run.assembly.data
    codec = data.codec
    if codec.media == "image":
        originals = data.take_originals("test", torch.arange(min(data.size("test"), _SMALL_COLUMNS**2)))
        if originals is not None:
            exhibits.append(_picture(run, "real held-out images", "real", originals))
    for model, steps in dict.fromkeys((row["model"], row["num_steps"]) for row in run.metrics["results"]):
        batch = None if model == "train" else run.samples(model, steps)
        if batch is not None:
            title = _title(run, model, steps)
            exhibits.append(_exhibit(run, title, f"{model}_{steps}", batch.tokens))
    if codec.media == "image":
        exhibits += _nearest(run)
    return exhibits


def _nearest(run: Run) -> list[Exhibit]:
    """Samples of the student as it was trained, or at its first number of steps, with their nearest training images."""
    tried = [row["num_steps"] for row in run.metrics["results"] if row["model"] == "student"]
    steps = run.plan.recipe.distill.num_steps if run.plan.recipe.distill.num_steps in tried else min(tried, default=0)
    batch = run.samples("student", steps) if steps else None
    if batch is None:
        return []
    data = run.assembly.data
    shown = torch.as_tensor(data.codec.decode(batch.tokens[:_PAIRS]))
    found, count = nearest_training_images(data, shown)
    title = f"{_title(run, 'student', steps)}: each sample, and on its right the nearest of {count} training images"
    return [_picture(run, title, f"student_{steps}_nearest", beside_each_other(shown, found))]


def _title(run: Run, model: str, steps: int) -> str:
    if model == "test":
        kind = run.assembly.data.codec.media
        return "held-out images through the codec" if kind == "image" else "held-out data"
    trained = ", as trained" if model == "student" and steps == run.plan.recipe.distill.num_steps else ""
    return f"{model}, {steps} step{'' if steps == 1 else 's'}{trained}"


def _exhibit(run: Run, title: str, name: str, tokens: Tensor) -> Exhibit:
    codec = run.assembly.data.codec
    shown: Any = codec.decode(tokens[:_LINES_KEPT])
    if codec.media == "image":
        return _picture(run, title, name, shown)
    lines = list(shown) if codec.media == "text" else [" ".join(map(str, row)) for row in tokens[:_LINES_KEPT].tolist()]
    path = run.directory / "samples" / f"{name}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines[:_LINES_KEPT]) + "\n", encoding="utf-8")
    return Exhibit(title, None, lines[:_LINES_SHOWN])


def _picture(run: Run, title: str, name: str, images: Tensor) -> Exhibit:
    columns = _SMALL_COLUMNS if images.shape[-1] <= _SMALL_PIXELS else _LARGE_COLUMNS
    path = f"samples/{name}.png"
    (run.directory / path).parent.mkdir(exist_ok=True)
    write_png(image_grid(images[: columns**2], columns=columns, tile=_TILE_PIXELS), run.directory / path)
    return Exhibit(title, path, [])
