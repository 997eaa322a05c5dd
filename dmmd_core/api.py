"""A run in one call, for scripts and notebooks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dmmd_core.errors import Problem, RecipeError, RunError
from dmmd_core.pipeline import Run
from dmmd_core.plugins import load_plugins
from dmmd_core.recipe import Recipe, change_recipe, load_recipe
from dmmd_core.records import PLUGINS, read_record
from dmmd_core.registry import Registry
from dmmd_core.resolve import resolve
from dmmd_core.smoke import clear_smoke_directory, smoke_settings


def prepare(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    smoke: bool = False,
    quiet: bool = False,
    profile: bool = False,
    outside: bool = True,
) -> Run:
    """Validate a recipe and build what it names, without writing anything.

    Args:
        recipe: The path of a recipe, or a recipe read before.
        overrides: ``key=value`` texts, as on the command line.
        registry: The components; all installed plugins by default.
        smoke: Shrink the run to seconds, as ``--smoke`` does; what an earlier such run left is removed.
        quiet: Print no progress.
        profile: Trace a few steps of every stage, as ``--profile`` does.
        outside: Also ask whether data and libraries are where the recipe says.

    Returns:
        The run, not begun; `Run.execute` begins or resumes it.

    Raises:
        RecipeError: Carries every problem with file, line and key.
        PluginError: A plugin cannot be loaded.
    """
    registry = registry or load_plugins()

    def read(background: Sequence[tuple[str, object]] = ()) -> Recipe:
        if isinstance(recipe, Recipe):
            return change_recipe(recipe, overrides, background)
        return load_recipe(recipe, overrides, background)

    wanted = read()
    try:
        plan = resolve(wanted, registry, outside=outside and not smoke)
    except RecipeError as error:
        raise RecipeError([*error.problems, *_providers_gone(wanted, registry)]) from error
    if smoke:
        plan = resolve(read(smoke_settings(plan, overrides)), registry)
        if int(os.environ.get("RANK", "0")) == 0:  # the others wait for it before they look
            clear_smoke_directory(plan.recipe.run.directory)
    return Run(plan, registry, quiet=quiet, profile=profile)


def run(
    recipe: str | Path | Recipe,
    overrides: Sequence[str] = (),
    *,
    registry: Registry | None = None,
    smoke: bool = False,
    quiet: bool = False,
    profile: bool = False,
) -> Run:
    """Run a recipe, or finish a run of it that was interrupted: the whole of ``dmmd-run``.

    A `KeyboardInterrupt`, which is the stop button of a notebook, ends the run at once; the same call goes on from the
    newest checkpoint.

    Args:
        recipe: The path of a recipe, or a recipe read before (`load_recipe`).
        overrides: ``key=value`` texts, as on the command line: ``["run.seed=1"]``.
        registry: The components; all installed plugins by default.
        smoke: Shrink the run to seconds, as ``--smoke`` does; what an earlier such run left is removed.
        quiet: Print neither progress nor tables; logs and reports are written all the same.
        profile: Trace a few steps of every training stage and one sampling call into ``profile/`` of the run directory,
            as ``--profile`` does.

    Returns:
        The finished run: ``metrics`` is the content of its ``metrics.json``, ``directory`` the place of its models,
        samples and reports.

    Raises:
        RecipeError: Carries every problem with file, line and key.
        PluginError: A plugin cannot be loaded.
        RunError: The run cannot go on, or its directory belongs to another recipe.
    """
    prepared = prepare(recipe, overrides, registry=registry, smoke=smoke, quiet=quiet, profile=profile)
    prepared.execute()
    return prepared


def _providers_gone(recipe: Recipe, registry: Registry) -> list[Problem]:
    """Who provided the components of the recipe's run directory that nobody provides any more."""
    file = Path(recipe.run.directory) / PLUGINS
    try:
        made = read_record(file)
    except (RunError, OSError):
        return []  # the recipe's own problems are told
    if made is None:
        return []
    plugins = {plugin["plugin"]: plugin for plugin in made["plugins"]}
    found = []
    for component, name in sorted(made["components"].items()):
        kind, _, own = component.partition(":")
        if own not in registry.names(kind) and name in plugins:
            package, version = plugins[name]["package"], plugins[name]["version"]
            message = (
                f"{kind} {own!r} came from plugin {name!r} of package {package} {version} when this run began; "
                "install that version, or give the file with --plugin"
            )
            found.append(Problem("", message, str(file)))
    return found
