"""The kit's entrance: one function a kind, and one for any component."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dmmd_core.interfaces import Component
from dmmd_core.registry import Registry
from dmmd_core.testing import backbone as backbones
from dmmd_core.testing import data as data_clauses
from dmmd_core.testing import generator as generators
from dmmd_core.testing import metric as metrics
from dmmd_core.testing import objective as objectives
from dmmd_core.testing import observer as observers
from dmmd_core.testing import process as processes
from dmmd_core.testing import sampler as samplers
from dmmd_core.testing import schedule as schedules
from dmmd_core.testing.report import Clause, ConformanceError, Report, run_clauses
from dmmd_core.testing.subject import GENERAL, Case, entry_of, kind_of, plugins, resolved

Params = Mapping[str, Any]
_KITS: dict[str, tuple[type[Case], Sequence[Clause]]] = {
    "schedule": (Case, schedules.CLAUSES),
    "process": (processes.ProcessCase, processes.CLAUSES),
    "backbone": (backbones.BackboneCase, backbones.CLAUSES),
    "generator": (generators.GeneratorCase, generators.CLAUSES),
    "objective": (objectives.ObjectiveCase, objectives.CLAUSES),
    "data": (data_clauses.DataCase, data_clauses.CLAUSES),
    "sampler": (samplers.SamplerCase, samplers.CLAUSES),
    "metric": (metrics.MetricCase, metrics.CLAUSES),
    "observer": (observers.ObserverCase, observers.CLAUSES),
}


def judge(
    component: str | type[Component],
    params: Params | None = None,
    *,
    kind: str = "",
    only: Collection[str] = (),
    skip: Collection[str] = (),
    registry: Registry | None = None,
) -> Report:
    """Hold a component against the clauses of its kind and return the report, whatever it says.

    Args:
        component: A class, or the name of a registered component.
        params: Parameters as a recipe would write them; by default those of ``--smoke``.
        kind: Its kind; needed beside a name.
        only: Names of the clauses to check; all by default.
        skip: Names of clauses to leave out on purpose.
        registry: Components for the slots; all installed plugins by default.

    Raises:
        PluginError: There is no such component, or it is of another kind.
        ValueError: `only` or `skip` names no clause.
    """
    kind = kind_of(component, kind)
    registry = plugins(registry)
    title = f"{kind} {component}"
    if isinstance(component, str):
        title += f" ({entry_of(component, kind, registry)[0].provider})"
    else:
        title = f"{kind} {component.__qualname__} of {component.__module__}"
    case_type, clauses = _KITS.get(kind, (Case, GENERAL))

    made: list[Case] = []

    def build() -> Case:
        entry, known = entry_of(component, kind, registry)
        part, given = resolved(entry, params, known)
        case = case_type(part, {}, given, known)
        case.prepare()
        made.append(case)
        if kind in _KITS:  # of other kinds the kit knows no sizes to build them at
            _ = case.component
        return case

    try:
        return run_clauses(title, build, clauses, only=only, skip=skip)
    finally:
        for case in made:
            case.close()


def check_component(
    component: str | type[Component],
    params: Params | None = None,
    *,
    kind: str = "",
    only: Collection[str] = (),
    skip: Collection[str] = (),
    registry: Registry | None = None,
) -> Report:
    """Hold a component of any kind against its clauses; arguments as for `judge`.

    Kinds without a kit of their own (teachers, codecs, features, ...) get the general clauses alone.

    Raises:
        ConformanceError: A clause is broken; the message tells which, what was found, and what to do.
    """
    report = judge(component, params, kind=kind, only=only, skip=skip, registry=registry)
    if not report.holds:
        raise ConformanceError(report)
    return report


def _checker(kind: str, what: str) -> Callable[..., Report]:
    def check(
        component: str | type[Component],
        params: Params | None = None,
        *,
        only: Collection[str] = (),
        skip: Collection[str] = (),
        registry: Registry | None = None,
    ) -> Report:
        return check_component(component, params, kind=kind, only=only, skip=skip, registry=registry)

    check.__name__ = check.__qualname__ = f"check_{kind}"
    check.__doc__ = f"Hold {what} against the clauses for its kind; arguments and errors as for `check_component`."
    return check


check_schedule = _checker("schedule", "a schedule")
check_process = _checker("process", "a process")
check_backbone = _checker("backbone", "a backbone")
check_generator = _checker("generator", "a generator")
check_objective = _checker("objective", "an objective")
check_data = _checker("data", "data")
check_sampler = _checker("sampler", "a sampler")
check_metric = _checker("metric", "a metric")
check_observer = _checker("observer", "an observer")


def clauses_of(kind: str) -> Sequence[Clause]:
    """The clauses for a kind, in the order of checking."""
    return _KITS.get(kind, (Case, GENERAL))[1]


def kits() -> tuple[str, ...]:
    """The kinds that have clauses of their own."""
    return tuple(_KITS)
