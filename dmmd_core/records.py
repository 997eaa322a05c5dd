"""The records of a run directory: which recipe it belongs to, finished stages, figures; damage to them is noticed.

Every part of a record has a sum beside it, a part that says nothing about the others, so that a record cut down to some
of its stages still holds. Records without sums, of an older version, are believed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from dmmd_core.checkpoint import TEMPORARY, write_json
from dmmd_core.errors import RecipeError, RunError
from dmmd_core.recipe import Recipe, differing_keys
from dmmd_core.saved import recipe_from_plain
from dmmd_core.schema import read_yaml

RECIPE, PLUGINS, STAGES, METRICS = "recipe.yaml", "plugins.json", "stages.json", "metrics.json"
CACHE = "cache"
_SUMS = "sums"
_REMEDIES = {
    STAGES: "remove it, and the same command finishes the stages again from their checkpoints",
    METRICS: "remove it, and the same command evaluates again",
    PLUGINS: "remove it, and the same command writes it anew, with the versions that are installed now",
}


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record with a sum for each of its parts.

    Raises:
        RunError: The disk is full or refuses; the old content is intact.
    """
    write_json(path, {**content, _SUMS: {name: _sum(part) for name, part in _parts(content).items()}})


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a record, without its sums; None where there is none.

    Raises:
        RunError: It is damaged, or has been changed; names the file, the part and what to do.
    """
    if not path.exists():
        return None
    remedy = _REMEDIES[path.name]
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        sums = content.pop(_SUMS, None)
        parts = _parts(content)
        bad = [] if sums is None else [name for name, part in parts.items() if sums.get(name) != _sum(part)]
        bad += [name for name in sums or () if _is_needed(path.name, name) and name not in parts]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise RunError(f"{path} is damaged ({type(error).__name__}: {error}); {remedy}") from error
    if bad:
        raise RunError(f"{path} is damaged: its sum of {', '.join(bad)} is another; {remedy}")
    return content


def has_only_begun(directory: Path, *, filled: Collection[str] = ()) -> bool:
    """Whether a directory holds nothing, or what a run leaves there that ended before it had written its recipe.

    Args:
        directory: Where to look.
        filled: Folders that may hold something all the same.
    """
    ours = {".lock", CACHE, f"{TEMPORARY}{RECIPE}"}
    return all(
        path.name in filled or (path.name in ours and not (path.is_dir() and any(path.iterdir())))
        for path in directory.iterdir()
    )


State = Literal["new", "kept", "damaged"]


def state_of(directory: Path, recipe: Recipe) -> State:
    """Whether a run directory is yet to begin, holds its recipe, or has lost it, which is then to be written anew.

    A recipe that is damaged is told from another one by its sum, which stands in ``plugins.json`` too.

    Raises:
        RunError: The directory belongs to another recipe or to something else.
    """
    path = directory / RECIPE
    other = f"run.directory: {directory} exists and is no run directory; choose another run.directory=..."
    if not directory.exists():
        return "new"
    if not directory.is_dir():
        raise RunError(other)
    if not path.exists():
        if has_only_begun(directory, filled=[CACHE]):  # put there; its parts are known by their fingerprints
            return "new"
        began_with = _began_with(directory) if (directory / STAGES).exists() else None
        if began_with is None:
            raise RunError(other)
        if began_with != sum_of_recipe(recipe):
            raise RunError(
                f"{path} is gone, and the run there began with another recipe than the one given; give that one, or "
                "choose another run.directory=..."
            )
        return "damaged"
    try:
        content, _ = read_yaml(path)
        keys = differing_keys(recipe_from_plain(content, str(path)), recipe)
    except RecipeError as error:
        if _began_with(directory) == sum_of_recipe(recipe):
            return "damaged"
        raise RunError(
            f"{path} is damaged ({error}), and the run there is not known to have begun with the recipe given; give "
            "the one that it began with, and it is written anew, or choose another run.directory=..."
        ) from error
    if not keys:
        return "kept"
    if _began_with(directory) == sum_of_recipe(recipe):
        return "damaged"
    where = "; ".join(f"{key} ({recipe.source.where(key)})" for key in keys[:8])
    raise RunError(
        f"{directory} holds a run of another recipe; it differs in: {where}; choose another run.directory=..., or "
        "remove that directory"
    )


def _began_with(directory: Path) -> Any:
    """Sum of the recipe that a run began with, or None."""
    return (read_record(directory / PLUGINS) or {}).get("recipe")


def sum_of_recipe(recipe: Recipe) -> str:
    """What tells a recipe from all others, its defaults written out."""
    return _sum(recipe.plain())


def _parts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What has a sum of its own: every entry, and of the figures every model at every number of steps."""
    parts = {name: part for name, part in content.items() if name != "results"}
    for row in content.get("results", ()):
        parts.setdefault(f"{row['model']} {row['num_steps']}", []).append(row)
    return parts


def _is_needed(record: str, name: str) -> bool:
    """Whether a part must be there where its sum is; finished stages and figures may be taken away."""
    return record != STAGES and " " not in name


def _sum(part: Any) -> str:
    return hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:16]
