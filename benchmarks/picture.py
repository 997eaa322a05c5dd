"""Put sample grids of a finished run side by side, for the README.

    python benchmarks/picture.py runs/quickstart docs/images/quickstart.png real teacher_4 teacher_64 student_4

The names are those of the pictures in the run's ``samples`` folder.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(run: Path, out: Path, names: list[str]) -> None:
    """Draw the named grids (``real``, or model and steps joined by an underscore) in one row with captions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(2.6 * len(names), 2.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), place)
        axes.imshow(Image.open(run / "samples" / f"{name}.png"), interpolation="nearest")
        model, _, steps = name.partition("_")
        plural = "" if steps == "1" else "s"
        axes.set_title(f"{model}, {steps} step{plural}" if steps else f"{model} images", fontsize=10)
        axes.axis("off")
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
