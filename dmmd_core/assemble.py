"""From a plan to objects: the only place that calls component constructors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from dmmd_core.errors import FieldError, Problem, RecipeError
from dmmd_core.interfaces import (
    Backbone,
    Component,
    Data,
    DataSpec,
    Denoiser,
    Generator,
    Metric,
    NetworkDenoiser,
    Objective,
    Observer,
    Process,
    Sampler,
    Teacher,
)
from dmmd_core.resolve import Part, Plan
from dmmd_core.schema import Source, join


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Run with torch's global generators seeded, and restore them afterwards."""
    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def build(part: Part, offers: Mapping[str, Any], source: Source) -> Component:
    """Call the constructor of a part, with its slots built first.

    Args:
        part: What to build.
        offers: Values that constructors may ask for by name.
        source: Where the recipe was written, for messages.

    Raises:
        RecipeError: The constructor refuses its Config or what the data offers; names file, line and key.
    """
    arguments: dict[str, Any] = {}
    for parameter in list(inspect.signature(part.cls).parameters.values())[1:]:
        name = parameter.name
        if name in part.slots:
            inner = part.slots[name]
            if isinstance(inner, list):
                arguments[name] = [build(item, offers, source) for item in inner]
            else:
                arguments[name] = inner and build(inner, offers, source)
        elif name in offers:
            arguments[name] = offers[name]
    try:
        return cast("Component", cast("Any", part.cls)(part.config, **arguments))
    except FieldError as error:
        key = join(join(part.key, "params"), error.field) if error.field else part.key
        raise RecipeError([Problem(key, error.message, source.where(key))]) from error
    except ValueError as error:
        raise RecipeError([Problem(part.key, str(error), source.where(part.key))]) from error


@dataclass
class Assembly:
    """Builds the components of one plan, each when it is needed.

    Args:
        plan: The resolved recipe.
        cache_directory: Where components may keep what they fitted.
        spec: Sizes of the data; taken from the data component where None.
    """

    plan: Plan
    cache_directory: Path | None = None
    spec: DataSpec | None = None

    def __post_init__(self) -> None:
        """Build data, process and sampler, which are cheap."""
        self.source = self.plan.recipe.source
        self.seed = self.plan.recipe.run.seed
        self.offers: dict[str, Any] = {"cache_directory": self.cache_directory, "seed": self.seed}
        if self.spec is None:
            self.data = cast("Data", self._build(self.plan.data))
            self.spec = self.data.spec
            self.offers["data"] = self.data
            self.offers["codec"] = self.data.codec
        self.offers.update(vars(self.spec))
        self.process = cast("Process", self._build(self.plan.process))
        self.offers["process"] = self.process
        self.offers["num_inputs"] = self.process.num_inputs
        self.sampler = cast("Sampler", self._build(self.plan.sampler))
        teacher_sampler = self.plan.teacher_sampler
        self.teacher_sampler = cast("Sampler", self._build(teacher_sampler)) if teacher_sampler else self.sampler

    def _build(self, part: Part, **more: Any) -> Component:
        return build(part, {**self.offers, **more}, self.source)

    def backbone(self) -> Backbone:
        """Build a freshly initialised backbone; the seed decides its weights."""
        with seeded(self.seed):
            return cast("Backbone", self._build(self.plan.backbone))

    def network(self) -> NetworkDenoiser:
        """Build a backbone read through the process."""
        return NetworkDenoiser(self.backbone(), self.process)

    def generator(self, backbone: Backbone) -> Generator:
        """Build the student around a backbone."""
        with seeded(self.seed + 1):
            return cast("Generator", self._build(self.plan.generator, backbone=backbone))

    def teacher(self) -> Denoiser:
        """Load the teacher that the recipe names."""
        assert self.plan.teacher_load is not None
        loader = cast("Teacher", self._build(self.plan.teacher_load, backbone=self.backbone()))
        return loader.denoiser()

    def objective(
        self,
        part: Part,
        *,
        network: Denoiser,
        teacher: Denoiser | None,
        copy_teacher: Callable[[], Denoiser] | None,
        num_steps: int | None,
        training_steps: int,
    ) -> Objective:
        """Build an objective for one stage."""
        return cast(
            "Objective",
            self._build(
                part,
                network=network,
                teacher=teacher,
                copy_teacher=copy_teacher,
                num_steps=num_steps,
                step_times=self.sampler.step_times,
                training_steps=training_steps,
            ),
        )

    def observers(self, directory: Path) -> list[Observer]:
        """Build all observers of a run in a directory."""
        recipe = self.plan.recipe
        offers = {"directory": directory, "name": recipe.name, "recipe": recipe.plain()}
        return [cast("Observer", self._build(part, **offers)) for part in self.plan.observers]

    def metrics(self) -> list[Metric]:
        """Build all metrics."""
        return [cast("Metric", self._build(part)) for part in self.plan.metrics]
