"""Run a recipe and sample its student from Python.

python examples/use_from_python.py recipes/quickstart.yaml runs/quickstart
"""

from __future__ import annotations

import sys
from pathlib import Path

from dmmd_core import Run, load_plugins, load_recipe, load_student
from dmmd_core.resolve import resolve


def main(recipe_path: str, directory: str) -> None:
    """Run (or finish) the recipe in `directory`, then draw sixteen samples at the trained number of steps."""
    registry = load_plugins()
    recipe = load_recipe(recipe_path, [f"run.directory={directory}"])
    run = Run(resolve(recipe, registry), registry)
    run.execute()
    for row in run.metrics["results"]:
        print(f"{row['model']:8} {row['num_steps']:3} steps  {row['metric']:20} {row['value']:.4f}")
    student = load_student(Path(directory))
    tokens = student.sample(16, seed=0)
    media = student.codec.decode(tokens)
    print(f"samples: tokens {tuple(tokens.shape)}, decoded {student.codec.media} {tuple(media.shape)}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
