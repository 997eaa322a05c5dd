"""``--dry-run``: the stages of a run, and how far each has come."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dmmd_core.checkpoint import checkpoints
from dmmd_core.records import METRICS, RECIPE, STAGES, read_record, state_of
from dmmd_core.resolve import Plan

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
    if (directory / RECIPE).exists():
        state_of(directory, recipe)
    done = read_record(directory / STAGES) or {}
    judged = {(row["model"], row["num_steps"]) for row in (read_record(directory / METRICS) or {}).get("results", [])}

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
