"""The recipe: one YAML file that assembles components into a run (DESIGN, "The recipe")."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dmmd_core.errors import FieldError, Problem
from dmmd_core.interfaces.component import Slot, option, slot
from dmmd_core.schema import Problems, Source, read_dataclass, read_yaml, refuse_interpolation

SCHEMA = 1
_FREE = {"observers"}  # keys that have no part in what a run computes


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """Adam with decoupled weight decay, and the learning rate over time."""

    learning_rate: float = option(3e-4, help="peak learning rate", above=0)
    beta1: float = option(0.9, help="decay of the first moment; D-MMD likes 0", minimum=0, below=1)
    beta2: float = option(0.999, help="decay of the second moment", minimum=0, below=1)
    epsilon: float = option(1e-8, help="added to the root of the second moment", above=0)
    weight_decay: float = option(0.0, help="decoupled weight decay", minimum=0)
    clip_norm: float | None = option(1.0, help="largest gradient norm per player; null for none", above=0)
    warmup_steps: int = option(0, help="steps of linear rise from zero", minimum=0)
    decay: Literal["constant", "linear", "cosine"] = option("constant", help="fall to zero after the warm-up")
    fused: bool | None = option(
        None, help="one kernel for all weights of a step; null is on CUDA only, where it is fastest"
    )


@dataclass(frozen=True, kw_only=True)
class TrainSection:
    """One training stage."""

    steps: int = option(help="optimiser steps", minimum=1)
    batch_size: int = option(128, help="examples per step, whatever the number of parts and processes", minimum=1)
    accumulate: int = option(
        1, help="parts in which a process takes its examples, one after another: less memory, same step", minimum=1
    )
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    ema: float = option(0.999, help="decay of the moving average of the result's weights", minimum=0, below=1)
    log_every: int = option(50, help="steps between log lines", minimum=1)
    checkpoint_every: int = option(1000, help="steps between checkpoints", minimum=1)
    skip_limit: int = option(
        10,
        help="steps that may be skipped, since a loss or gradient is not finite, before the run stops; never more than "
        "a tenth of all",
        minimum=0,
    )

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        if self.accumulate > self.batch_size:
            raise FieldError("accumulate", f"must be at most batch_size {self.batch_size}, got {self.accumulate}")


@dataclass(frozen=True, kw_only=True)
class InitializeSection(TrainSection):
    """Training of the networks on a loaded teacher's outputs, before distillation."""

    objective: Slot = slot("objective", help="objective with a loaded teacher as target")


@dataclass(frozen=True, kw_only=True)
class DistillSection(TrainSection):
    """Distillation."""

    num_steps: int = option(help="sampling steps k that the student is trained for", minimum=1)
    initialize: InitializeSection | None = None


@dataclass(frozen=True, kw_only=True)
class TeacherSection:
    """A teacher trained in the run (`objective` and `train`) or loaded (`load`)."""

    objective: Slot | None = slot("objective", None, help="objective of teacher training")
    train: TrainSection | None = None
    load: Slot | None = slot("teacher", None, help="a ready teacher")

    def __post_init__(self) -> None:
        """A teacher is trained or loaded, not both."""
        if (self.load is None) == (self.objective is None and self.train is None):
            raise FieldError("", "give either load, or objective and train")
        if self.load is None and (self.objective is None or self.train is None):
            missing = "objective" if self.objective is None else "train"
            raise FieldError("", f"a trained teacher needs objective and train, {missing} is missing")


@dataclass(frozen=True, kw_only=True)
class EvaluateSection:
    """What is sampled and measured."""

    teacher_steps: list[int] = option([], help="numbers of steps at which the teacher is judged", minimum=1)
    student_steps: list[int] = option([], help="numbers of steps at which the student is judged", minimum=1)
    num_samples: int = option(1000, help="samples per model and number of steps", minimum=1)
    batch_size: int = option(500, help="samples drawn at a time; does not change them", minimum=1)
    metrics: list[Slot] = slot("metric", help="what is measured", many=True)
    teacher_sampler: Slot | None = slot(
        "sampler", None, help="how the teacher is sampled, where it differs from sampler: shaped, for example"
    )


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where and how the run happens."""

    directory: str = option(help="run directory, relative to where the command is given")
    seed: int = option(0, help="seed of everything random", minimum=0)
    device: str = option("auto", help="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", help="autocast precision of the networks; auto is bfloat16 on CUDA, float32 elsewhere"
    )
    tf32: bool = option(False, help="float32 matrix products in TensorFloat-32 on CUDA: faster, 10 bits of mantissa")
    compile: bool = option(False, help="compile the networks with torch.compile, piece by piece")
    activation_checkpointing: bool = option(
        False, help="keep no activations within a piece of a network: less memory, one more forward pass"
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", help="what each of several processes holds in training: all weights (ddp), or a share of them (fsdp)"
    )
    threads: int | None = option(
        None,
        help="CPU threads of a tensor operation; null for torch's own choice (1 is fastest for tiny networks)",
        minimum=1,
    )
    keep_checkpoints: int = option(2, help="checkpoints kept per stage", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe; the components' own parameters are checked by `dmmd_core.resolve.resolve`."""

    schema: int = option(help="version of the recipe format")
    name: str = option(help="name of the run, shown in reports")
    data: Slot = slot("data", help="what is learned")
    process: Slot = slot("process", help="the noise process")
    backbone: Slot = slot("backbone", help="the network of teacher, auxiliary and student")
    teacher: TeacherSection
    generator: Slot = slot("generator", help="the student")
    objective: Slot = slot("objective", help="the distillation objective")
    distill: DistillSection
    sampler: Slot = slot("sampler", help="how models are sampled")
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
    observers: list[Slot] = slot("observer", help="who is told of the run while it goes on", many=True)
    run: RunSection
    source: Source = field(default=Source("recipe"), compare=False, repr=False, metadata={"internal": True})

    def __post_init__(self) -> None:
        """Refuse recipes of another format."""
        if self.schema != SCHEMA:
            way = (
                "the recipe is of a newer dmmd: upgrade dmmd"
                if self.schema > SCHEMA
                else "the recipe is of an older dmmd: bring it up to date (CHANGELOG.md tells what changed), or run it "
                "with the version that it was written for"
            )
            raise FieldError("schema", f"must be {SCHEMA} for this version of dmmd, got {self.schema}; {way}")

    def training_sections(self) -> dict[str, TrainSection]:
        """The training stages of this recipe by name: ``teacher``, ``initialize``, ``distill``."""
        found = {"teacher": self.teacher.train, "initialize": self.distill.initialize, "distill": self.distill}
        return {name: section for name, section in found.items() if section is not None}

    def plain(self) -> dict[str, Any]:
        """Return the recipe as plain containers, every default written out, ready for YAML."""
        content = dataclasses.asdict(dataclasses.replace(self, source=Source("")))
        del content["source"]
        return content


def load_recipe(path: str | Path, overrides: Sequence[str] = (), background: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Read and validate a recipe.

    Args:
        path: The YAML file.
        overrides: ``key=value`` texts from the command line, validated like the file.
        background: ``(key, value)`` pairs applied before the overrides (``--smoke`` uses them).

    Returns:
        The recipe, with its `Source` for later messages.

    Raises:
        RecipeError: Carries every problem with file, line and key.
    """
    content, lines = read_yaml(Path(path))
    return _read(content, str(path), lines, overrides, background)


def change_recipe(recipe: Recipe, overrides: Sequence[str] = (), background: Sequence[tuple[str, Any]] = ()) -> Recipe:
    """Change keys of a recipe and validate it again; arguments, result and errors as for `load_recipe`."""
    return _read(recipe.plain(), recipe.source.path, recipe.source.lines, overrides, background)


def _read(
    content: dict[str, Any],
    path: str,
    lines: Mapping[str, int],
    overrides: Sequence[str],
    background: Sequence[tuple[str, Any]],
) -> Recipe:
    config = OmegaConf.create(content)
    for key, value in background:
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    texts: dict[str, str] = {}
    problems = Problems(Source(path, lines, texts))
    for text in overrides:
        _apply_override(config, text, texts, problems)
    problems.raise_if_any()
    source = Source(path, lines, texts)
    plain = OmegaConf.to_container(config, resolve=False)
    refuse_interpolation(plain, source)
    problems = Problems(source)
    recipe = read_dataclass(Recipe, plain, "", problems, "a recipe", internal={"source": source})
    problems.raise_if_any()
    assert isinstance(recipe, Recipe)
    return recipe


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` texts, as overrides are written, into plain containers.

    Raises:
        RecipeError: A text is no ``key=value``, or cannot be applied.
    """
    config, problems = OmegaConf.create({}), Problems(Source("command line"))
    for text in texts:
        _apply_override(config, text, {}, problems)
    problems.raise_if_any()
    return cast("dict[str, Any]", OmegaConf.to_container(config, resolve=False))


def _apply_override(config: Any, text: str, texts: dict[str, str], problems: Problems) -> None:
    key, equals, value_text = text.partition("=")
    if not equals or not key:
        problems.found.append(Problem(key, "an override must be key=value", f"override {text!r}"))
        return
    texts[key] = text
    try:
        value = yaml.safe_load(value_text) if value_text else None
        if isinstance(value, str):
            value = OmegaConf.create({"value": value_text}).value if "${" not in value else value
        OmegaConf.update(config, key, value, merge=False, force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, IndexError, AssertionError) as error:
        problems.found.append(Problem(key, f"cannot be applied: {str(error).splitlines()[0]}", f"override {text!r}"))


def _collect(recipe: Recipe) -> dict[str, Any]:
    flat: dict[str, Any] = {}

    def walk(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        else:
            flat[key] = value

    walk(recipe.plain(), "")
    return flat


def differing_keys(old: Recipe, new: Recipe) -> list[str]:
    """Key paths in which two recipes differ so that their results may, sorted: a run may change its observers."""
    before, after = _collect(old), _collect(new)
    missing, keys = object(), (before.keys() | after.keys()) - _FREE
    return sorted(key for key in keys if before.get(key, missing) != after.get(key, missing))
