"""The hooks a plugin may implement: one to register components, the others to observe a run.

Hooks discover and observe; components compute. No tensor and no loss passes through a hook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from dmmd_core.errors import Problem
    from dmmd_core.pipeline import Run
    from dmmd_core.recipe import Recipe
    from dmmd_core.registry import PluginRegistrar

PROJECT = "dmmd"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def dmmd_register(registry: PluginRegistrar) -> None:
    """Register components: ``registry.add("process", "masked", Masked)``.

    Args:
        registry: Knows which plugin is speaking, so that every component is listed with its provider.
    """


@hookspec
def dmmd_check_recipe(recipe: Recipe) -> Sequence[Problem]:  # type: ignore[empty-body]
    """Return problems with a recipe, beyond what components declare; an empty list where there are none.

    Args:
        recipe: The validated recipe, before anything is built.
    """


@hookspec
def dmmd_before_run(run: Run) -> None:
    """Called once when everything is assembled, before the first stage.

    Args:
        run: The run: recipe, directory, stages, components.
    """


@hookspec
def dmmd_after_step(run: Run, step: int, metrics: Mapping[str, float]) -> None:
    """Called after every ``log_every``-th unit of work of the current stage (``run.stage``), and after its last.

    Args:
        run: The run; ``run.stage`` and ``run.stage_steps`` tell the stage and its number of steps.
        step: Steps done in this stage, counted from 1.
        metrics: Scalars of this step as Python floats.
    """


@hookspec
def dmmd_after_stage(run: Run, stage: str, results: Mapping[str, Any]) -> None:
    """Called after a stage has finished and its results are safe on disk.

    Args:
        run: The run.
        stage: ``data``, ``teacher``, ``initialize``, ``distill`` or ``evaluate``.
        results: What the stage reported, JSON-serialisable.
    """


@hookspec
def dmmd_after_checkpoint(run: Run, step: int, path: Path) -> None:
    """Called after a checkpoint is complete on disk.

    Args:
        run: The run.
        step: Steps done in the stage.
        path: The checkpoint's directory.
    """


@hookspec
def dmmd_on_warning(run: Run, step: int, message: str) -> None:
    """Called where a run goes on but somebody should look: a step was skipped, a student seems to collapse.

    Args:
        run: The run; ``run.stage`` tells the stage.
        step: Steps done in the stage.
        message: One sentence.
    """


@hookspec
def dmmd_after_run(run: Run, error: BaseException | None) -> None:
    """Called once at the end, also of a run that failed or was interrupted.

    Args:
        run: The run.
        error: What ended it early, or None.
    """
