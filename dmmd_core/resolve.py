"""From a recipe to a plan: every slot with its class and typed Config, and every declared capability checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dmmd_core.errors import FieldError, Problem
from dmmd_core.interfaces.component import Component, Requirement, Slot
from dmmd_core.recipe import Recipe
from dmmd_core.registry import Entry, Registry
from dmmd_core.schema import Problems, join, read_dataclass


@dataclass(frozen=True)
class Part:
    """One component of a recipe, typed and not yet built.

    Attributes:
        key: Key path of its slot in the recipe.
        entry: Its class and provider.
        config: Its Config.
        slots: The components in its Config's slots, by field.
    """

    key: str
    entry: Entry
    config: Any
    slots: dict[str, Part | list[Part] | None] = field(default_factory=dict)

    @property
    def cls(self) -> type[Component]:
        """The component's class."""
        return self.entry.cls

    def walk(self) -> Iterator[Part]:
        """Yield this part and all parts within."""
        yield self
        for inner in self.slots.values():
            for part in inner if isinstance(inner, list) else [inner]:
                if part is not None:
                    yield from part.walk()

    def provides(self) -> frozenset[str]:
        """Capabilities of this part and of the parts within."""
        return frozenset().union(*(part.cls.provides(part.config) for part in self.walk()))


@dataclass(frozen=True)
class Plan:
    """A recipe whose every component is known and compatible."""

    recipe: Recipe
    data: Part
    process: Part
    backbone: Part
    generator: Part
    objective: Part
    sampler: Part
    teacher_sampler: Part | None
    metrics: list[Part]
    teacher_objective: Part | None
    teacher_load: Part | None
    initialize_objective: Part | None
    observers: list[Part] = field(default_factory=list)

    def parts(self) -> Iterator[Part]:
        """Yield every part at every depth."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Part):
                    yield from part.walk()


def resolve(recipe: Recipe, registry: Registry, *, outside: bool = True) -> Plan:
    """Type every component's parameters and check what components require of each other.

    Args:
        recipe: The recipe.
        registry: The components.
        outside: Also ask what depends on the outside world: whether data are where the recipe says, for example.

    Raises:
        RecipeError: Carries every problem found, including those of the hook ``dmmd_check_recipe``.
    """
    problems = Problems(recipe.source, outside=outside)
    initialize = recipe.distill.initialize
    plan = Plan(
        recipe=recipe,
        data=_required(recipe.data, "data", "data", registry, problems),
        process=_required(recipe.process, "process", "process", registry, problems),
        backbone=_required(recipe.backbone, "backbone", "backbone", registry, problems),
        generator=_required(recipe.generator, "generator", "generator", registry, problems),
        objective=_required(recipe.objective, "objective", "objective", registry, problems),
        sampler=_required(recipe.sampler, "sampler", "sampler", registry, problems),
        teacher_sampler=_part(
            recipe.evaluate.teacher_sampler, "sampler", "evaluate.teacher_sampler", registry, problems
        ),
        metrics=[
            _required(metric, "metric", f"evaluate.metrics[{place}]", registry, problems)
            for place, metric in enumerate(recipe.evaluate.metrics)
        ],
        teacher_objective=_part(recipe.teacher.objective, "objective", "teacher.objective", registry, problems),
        teacher_load=_part(recipe.teacher.load, "teacher", "teacher.load", registry, problems),
        initialize_objective=_part(
            initialize.objective if initialize else None,
            "objective",
            "distill.initialize.objective",
            registry,
            problems,
        ),
        observers=[
            _required(observer, "observer", f"observers[{place}]", registry, problems)
            for place, observer in enumerate(recipe.observers)
        ],
    )
    problems.raise_if_any()
    _check_roles(plan, problems)
    for answer in registry.hooks.dmmd_check_recipe(recipe=recipe):
        problems.found.extend(
            Problem(problem.key, problem.message, problem.where or recipe.source.where(problem.key))
            for problem in answer or ()
        )
    problems.raise_if_any()
    return plan


def resolve_slot(wanted: Slot, kind: str, key: str, registry: Registry, problems: Problems) -> Part | None:
    """Find the component of a slot and type its parameters, with all slots within."""
    try:
        entry = registry.get(kind, wanted.name)
    except KeyError as error:
        problems.add(join(key, "name"), error.args[0])
        return None
    what = f"{kind} {wanted.name!r}"
    config = read_dataclass(entry.cls.Config, wanted.params, join(key, "params"), problems, what)
    if config is None:
        return None
    slots: dict[str, Part | list[Part] | None] = {}
    for spec in dataclasses.fields(config):
        if "slot" not in spec.metadata:
            continue
        inner_kind, place = spec.metadata["slot"], join(join(key, "params"), spec.name)
        value = getattr(config, spec.name)
        if isinstance(value, list):
            parts = [
                resolve_slot(item, inner_kind, f"{place}[{index}]", registry, problems)
                for index, item in enumerate(value)
            ]
            slots[spec.name] = [part for part in parts if part is not None]
        else:
            slots[spec.name] = value and resolve_slot(value, inner_kind, place, registry, problems)
    try:
        if problems.outside:
            entry.cls.check(config)
    except FieldError as error:
        problems.add(join(join(key, "params"), error.field) if error.field else key, error.message)
    return Part(key, entry, config, slots)


def _part(wanted: Slot | None, kind: str, key: str, registry: Registry, problems: Problems) -> Part | None:
    return None if wanted is None else resolve_slot(wanted, kind, key, registry, problems)


def _required(wanted: Slot, kind: str, key: str, registry: Registry, problems: Problems) -> Part:
    # A missing part has left a problem behind, and nobody sees the plan then.
    return typing.cast("Part", resolve_slot(wanted, kind, key, registry, problems))


def _check_roles(plan: Plan, problems: Problems) -> None:
    """Check every declared requirement against what all parts in that role provide."""
    if plan.teacher_load:
        teacher = plan.teacher_load.provides() | {"loaded"}
    else:
        teacher = frozenset({"weights"}) | (plan.teacher_objective.provides() if plan.teacher_objective else set())
    if "weights" in teacher:
        teacher |= plan.backbone.provides()  # it is a network on the recipe's backbone
    teacher_name = plan.teacher_load.entry.name if plan.teacher_load else "trained in the run"
    parts: dict[str, list[Part | None]] = {
        "data": [plan.data],
        "process": [plan.process],
        "backbone": [plan.backbone],
        "generator": [plan.generator],
        "sampler": [plan.sampler, plan.teacher_sampler],
        "objective": [plan.objective, plan.teacher_objective, plan.initialize_objective],
    }
    roles = {role: [(part.entry.name, part.provides()) for part in found if part] for role, found in parts.items()}
    roles["teacher"] = [(teacher_name, teacher)]
    for part in plan.parts():
        for need in part.cls.requires(part.config):
            for name, provided in roles.get(need.role, [("nothing", frozenset())]):
                if need.capability not in provided:
                    _refuse(part, need, name, problems)
    if "guides" in plan.sampler.provides():
        problems.add(
            plan.sampler.key,
            "samples the student, which is never guided: it absorbs its teacher's guidance in distillation; move the "
            "guidance to evaluate.teacher_sampler",
        )
    _check_duty(plan.teacher_objective, "trains_teacher", "train a teacher from data", problems)
    _check_duty(plan.initialize_objective, "initializes", "learn from a loaded teacher's outputs", problems)
    _check_duty(plan.objective, "distills", "distil", problems)
    if "weights" not in teacher and plan.initialize_objective is None:
        problems.add(
            "distill",
            f"the teacher {teacher_name!r} has no weights to start from; give distill.initialize, a training of "
            "the networks on its outputs",
        )
    if "weights" in teacher and plan.initialize_objective is not None:
        problems.add(
            "distill.initialize", "the student starts from the teacher's weights; remove initialize, or load a teacher"
        )


def _check_duty(part: Part | None, capability: str, duty: str, problems: Problems) -> None:
    if part is not None and capability not in part.provides():
        problems.add(part.key, f"objective {part.entry.name!r} configured so cannot {duty}")


def _refuse(part: Part, need: Requirement, name: str, problems: Problems) -> None:
    key = join(join(part.key, "params"), need.field) if need.field else part.key
    problems.add(
        key,
        f"{part.entry.kind} {part.entry.name!r} needs capability {need.capability!r} {need.reason}, "
        f"which {need.role} {name!r} does not provide",
    )
