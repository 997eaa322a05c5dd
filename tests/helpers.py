"""Small recipes and ways to run them, shared by the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import yaml

from dmmd_core import load_plugins
from dmmd_core.pipeline import Run
from dmmd_core.plugins import GROUP
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain
from dmmd_core.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def tiny_recipe(directory: Path, **sections: Any) -> dict[str, Any]:
    """A complete recipe of seconds: a Markov chain, an exact teacher, a handful of steps."""
    train = {"steps": 6, "batch_size": 8, "log_every": 2, "checkpoint_every": 2}
    recipe: dict[str, Any] = {
        "schema": 1,
        "name": "tiny",
        "data": {"name": "markov_chain", "params": {"letters": 3, "length": 3}},
        "process": {"name": "masked"},
        "backbone": {"name": "mlp", "params": {"width": 16, "depth": 1, "embedding_width": 8}},
        "teacher": {"load": {"name": "exact"}},
        "generator": {"name": "noise_conditioned", "params": {"width": 4}},
        "objective": {"name": "moment_matching"},
        "distill": {
            "num_steps": 2,
            **train,
            "initialize": {"objective": {"name": "denoising", "params": {"target": "teacher"}}, **train},
        },
        "sampler": {"name": "ancestral"},
        "evaluate": {
            "teacher_steps": [1],
            "student_steps": [2],
            "num_samples": 20,
            "metrics": [{"name": "token_entropy"}],
        },
        "run": {"directory": str(directory / "run"), "device": "cpu"},
    }
    recipe.update(sections)
    return recipe


def make_run(recipe: dict[str, Any]) -> Run:
    """A run without observers, for tests that drive the loop by hand."""
    registry = load_plugins(entry for entry in entry_points(group=GROUP) if entry.name != "reporting")
    return Run(resolve(recipe_from_plain(recipe, "recipe"), registry), registry)


def make_trainer(tmp_path: Path, **changes: Any) -> tuple[Run, Trainer]:
    """The trainer of a distillation of a tiny transformer with dropout."""
    recipe = tiny_recipe(tmp_path, teacher={"objective": {"name": "denoising"}, "train": {"steps": 1}})
    recipe["distill"] = {"num_steps": 2, "steps": 4, "batch_size": 4, **changes}
    recipe["backbone"] = {"name": "transformer", "params": {"width": 8, "heads": 1, "depth": 1, "dropout": 0.5}}
    run = make_run(recipe)
    run.stage = "distill"
    network = run.assembly.network()
    objective = run.assembly.objective(
        run.plan.objective,
        network=run.assembly.generator(run.assembly.backbone()),
        teacher=network,
        copy_teacher=run.assembly.network,
        num_steps=2,
        training_steps=run.plan.recipe.distill.steps,
    )
    return run, Trainer(run, "distill", objective, run.plan.recipe.distill, tmp_path / "checkpoints")


def write_recipe(directory: Path, recipe: dict[str, Any]) -> Path:
    """Write a recipe as YAML and return its path."""
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def environment(**more: str) -> dict[str, str]:
    """The environment for child processes: one thread, no color, no GPU."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1", **more}


def dmmd_run(*arguments: str | Path, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``python -m dmmd_core`` as a user would."""
    command = [sys.executable, "-m", "dmmd_core", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd or ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
