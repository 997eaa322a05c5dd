"""``--dry-run``: the stages of a run, and how far each has come."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmmd_core.checkpoint import checkpoints
from dmmd_core.errors import RunError
from dmmd_core.recipe import Recipe, differing_keys
from dmmd_core.resolve import Plan
from dmmd_core.saved import recipe_from_plain
from dmmd_core.schema import read_yaml

State = Literal["done", "begun", "to do"]


@dataclass(frozen=True)
class Item:
    """One stage.

    Attributes:
        stage: Its name.
        work: What there is to do, for people.
        state: How far it has come.
        detail: Seconds it took, or the step it has reached; empty where it has not begun.
    """

    stage: str
    work: str
    state: State
    detail: str = ""


def agenda(plan: Plan) -> list[Item]:
    """List the stages of a run in their order; writes nothing and builds nothing.

    Raises:
        RunError: The directory belongs to another recipe, or a file in it is damaged.
    """
    recipe = plan.recipe
    directory = Path(recipe.run.directory)
    _refuse_other_recipe(directory / "recipe.yaml", recipe)
    done = _read(directory / "stages.json")
    judged = {(row["model"], row["num_steps"]) for row in _read(directory / "metrics.json").get("results", [])}

    def item(stage: str, work: str, steps: int = 0) -> Item:
        if stage in done:
            again = ", prepared anew in every process" if stage == "data" else ""
            return Item(stage, work, "done", f"{done[stage]['seconds']:.1f} s{again}")
        kept = checkpoints(directory / "checkpoints" / stage)
        if kept:
            return Item(stage, work, "begun", f"step {int(kept[0].name.rpartition('_')[2])} of {steps}")
        return Item(stage, work, "to do")

    items = [item("data", f"prepare {plan.data.entry.name}")]
    if recipe.teacher.train is not None and plan.teacher_objective is not None:
        train = recipe.teacher.train
        work = f"{plan.teacher_objective.entry.name}: {train.steps:,} steps of {train.batch_size}"
        items.append(item("teacher", work, train.steps))
    initialize = recipe.distill.initialize
    if initialize is not None and plan.initialize_objective is not None:
        work = f"{plan.initialize_objective.entry.name}: {initialize.steps:,} steps of {initialize.batch_size}"
        items.append(item("initialize", work, initialize.steps))
    distill = recipe.distill
    work = f"{plan.objective.entry.name}: {distill.steps:,} steps of {distill.batch_size}"
    items.append(item("distill", work, distill.steps))
    return [*items, _evaluation(plan, item, judged)]


def _evaluation(plan: Plan, item: Any, judged: set[tuple[str, int]]) -> Item:
    section = plan.recipe.evaluate
    jobs = [("train", 0), ("test", 0)]
    jobs += [("teacher", steps) for steps in section.teacher_steps]
    jobs += [("student", steps) for steps in section.student_steps]
    figures = ", ".join(part.entry.name for part in plan.metrics) or "no metrics"
    found: Item = item("evaluate", f"{len(jobs)} sets of {section.num_samples:,} samples: {figures}")
    count = len(judged & set(jobs))
    if found.state == "to do" and count:
        return Item(found.stage, found.work, "begun", f"{count} of {len(jobs)} sets judged")
    return found


def _refuse_other_recipe(path: Path, recipe: Recipe) -> None:
    if not path.exists():
        return
    content, _ = read_yaml(path)
    keys = differing_keys(recipe_from_plain(content, str(path)), recipe)
    if keys:
        where = "; ".join(f"{key} ({recipe.source.where(key)})" for key in keys[:8])
        raise RunError(f"{path.parent} holds a run of another recipe; it differs in: {where}")


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); remove it to redo the stages from their checkpoints") from error
    return content
