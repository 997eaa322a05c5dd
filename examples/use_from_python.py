"""Run a recipe, read its figures and draw samples, from Python.

python examples/use_from_python.py recipes/quickstart.yaml runs/quickstart
"""

from __future__ import annotations

import sys

import torch

from dmmd_core import load_plugins, load_recipe, load_student, run


def main(path: str, directory: str) -> None:
    """Run (or finish) the recipe in `directory`, then draw samples at the trained number of steps and at one."""
    registry = load_plugins()  # files=["my_plugin.py"] adds a plugin of a single file
    recipe = load_recipe(path, [f"run.directory={directory}"])
    finished = run(recipe, registry=registry)
    for row in finished.metrics["results"]:
        print(f"{row['model']:8} {row['num_steps']:3} steps  {row['metric']:20} {row['value']:.4f}")
    student = load_student(finished.directory, registry=registry)
    tokens = student.sample(16, seed=0)  # as many steps as it was trained for; the seed decides the samples
    media = student.codec.decode(tokens)
    size = len(media) if isinstance(media, list) else tuple(media.shape)  # texts are a list
    print(f"samples: tokens {tuple(tokens.shape)}, decoded {student.codec.media} {size}")
    generator = torch.Generator().manual_seed(1)
    first, second = (student.sample(16, steps=1, generator=generator) for _ in range(2))  # two draws, two batches
    print(f"in one step: {int((first != second).any(-1).sum())} of 16 samples differ from the next draw's")


if __name__ == "__main__":
    main(*sys.argv[1:3])
