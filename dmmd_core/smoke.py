"""``--smoke``: the same pipeline at a size of seconds, in a directory of its own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dmmd_core.errors import RunError
from dmmd_core.interfaces.component import Slot
from dmmd_core.records import RECIPE, has_only_begun
from dmmd_core.resolve import Plan

SUFFIX = "-smoke"
_STEPS = 12
_BATCH = 16
_SAMPLES = 64


def smoke_settings(plan: Plan, overrides: Sequence[str]) -> list[tuple[str, Any]]:
    """Recipe keys that shrink a run: fewer steps and samples, and what each component offers for itself.

    Args:
        plan: The full-size plan.
        overrides: The user's own, which win.
    """
    recipe = plan.recipe
    settings: list[tuple[str, Any]] = [
        ("run.directory", recipe.run.directory.rstrip("/") + SUFFIX),
        ("evaluate.num_samples", min(recipe.evaluate.num_samples, _SAMPLES)),
        ("evaluate.teacher_steps", [min(steps, 4) for steps in recipe.evaluate.teacher_steps[:1]]),
        ("evaluate.student_steps", [min(steps, 4) for steps in recipe.evaluate.student_steps[:1]]),
    ]
    sections = {
        "teacher.train": recipe.teacher.train,
        "distill.initialize": recipe.distill.initialize,
        "distill": recipe.distill,
    }
    for key, section in sections.items():
        if section is not None:
            settings += [
                (f"{key}.steps", min(section.steps, _STEPS)),
                (f"{key}.batch_size", min(section.batch_size, _BATCH)),
                (f"{key}.accumulate", min(section.accumulate, section.batch_size, _BATCH)),
                (f"{key}.log_every", min(section.log_every, 5)),
                (f"{key}.optimizer.warmup_steps", min(section.optimizer.warmup_steps, _STEPS // 2)),
            ]
    replaced: list[str] = []  # slots that a component fills with another one
    for part in plan.parts():
        if any(part.key == key or part.key.startswith(f"{key}.") for key in replaced):
            continue
        smaller = part.cls.smoke(part.config)
        if smaller != part.config:
            # A default slot is not in the file yet, so its name goes along.
            settings.append((f"{part.key}.name", part.entry.name))
            for spec in dataclasses.fields(smaller):
                value, key = getattr(smaller, spec.name), f"{part.key}.params.{spec.name}"
                if value == getattr(part.config, spec.name):
                    continue
                if isinstance(value, Slot):
                    replaced.append(key)
                    value = dataclasses.asdict(value)
                settings.append((key, value))
    chosen = {text.partition("=")[0] for text in overrides}
    return [(key, value) for key, value in settings if key not in chosen]


def clear_smoke_directory(directory: str) -> None:
    """Remove what an earlier smoke run left; never touches a directory of another name or kind."""
    path = Path(directory)
    if not path.name.endswith(SUFFIX) or not path.exists():
        return
    if not path.is_dir() or not ((path / RECIPE).exists() or has_only_begun(path)):
        raise RunError(f"run.directory: {path} exists and is no run directory; remove it, or choose another")
    shutil.rmtree(path)
