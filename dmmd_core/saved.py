"""Model folders: weights, recipe, sizes and codec, and how to load them again."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core.assemble import Assembly
from dmmd_core.card import CARD, card
from dmmd_core.checkpoint import (
    load_tensors,
    load_weights,
    save_tensors,
    verify_directory,
    write_directory,
    write_text,
)
from dmmd_core.distributed import Processes
from dmmd_core.draws import Draws
from dmmd_core.errors import CheckpointError, Problem, RecipeError, RunError
from dmmd_core.hub import download_folder, may_be_repository, upload_folder
from dmmd_core.interfaces import Codec, Condition, DataSpec, Denoiser, Process, Sampler, Slot, TextCodec
from dmmd_core.plugins import load_plugins
from dmmd_core.recipe import Recipe
from dmmd_core.registry import Registry
from dmmd_core.resolve import Plan, resolve
from dmmd_core.schema import Problems, Source, read_dataclass
from dmmd_core.shaping import ShapedDenoiser
from dmmd_core.sharding import whole_tensors

Role = Literal["teacher", "student"]
_SCHEMA = 1
FREE = -1  # in a template: a position that the model fills in


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a model is."""
    return {name: version(name) for name in ("dmmd", "torch", "numpy", "pluggy", "omegaconf", "safetensors")}


def save_model(
    path: Path,
    role: Role,
    denoiser: Denoiser,
    assembly: Assembly,
    facts: dict[str, Any],
    processes: Processes = Processes(),  # noqa: B008 - immutable
) -> None:
    """Write a model folder atomically.

    Args:
        path: The folder.
        role: What the model is.
        denoiser: Its weights.
        assembly: Its recipe, sizes and codec.
        facts: Further entries of ``config.json``.
        processes: Those that call this together; the first one writes.
    """
    weights = whole_tensors(denoiser.state_dict())
    assert assembly.spec is not None
    codec = assembly.data.codec
    recipe = dataclasses.replace(assembly.plan.recipe, observers=[])  # who looked on has no part in a model
    parts = [part for part in assembly.plan.parts() if part.entry.kind != "observer"]
    config = {
        "schema": _SCHEMA,
        "role": role,
        "spec": dataclasses.asdict(assembly.spec),
        "codec_fingerprint": codec.fingerprint(),
        "media": codec.media,
        "versions": package_versions(),
        "recipe": recipe.plain(),
        "providers": {f"{p.entry.kind}:{p.entry.name}": str(p.entry.provider) for p in parts},
        **facts,
    }

    def fill(folder: Path) -> None:
        save_tensors(folder / "model.safetensors", weights)
        save_tensors(folder / "codec.safetensors", codec.state())
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card(config), encoding="utf-8")

    processes.from_main(lambda: write_directory(path, fill))


def write_card(path: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Write a model folder's card again, with the figures of an evaluation (rows of ``metrics.json``)."""
    write_text(path / CARD, card(read_config(path), results))


def read_config(path: Path) -> dict[str, Any]:
    """Read and check a model folder's ``config.json``.

    Raises:
        CheckpointError: The folder is missing, damaged or of another version.
    """
    if not path.is_dir():
        raise CheckpointError(f"there is no model folder {path}; give a run directory or its teacher or student folder")
    verify_directory(path)
    config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if config.get("schema") != _SCHEMA:
        raise CheckpointError(
            f"{path / 'config.json'} has schema {config.get('schema')!r}, this version of dmmd reads {_SCHEMA}; load "
            f"it with the version that wrote it ({config.get('versions', {}).get('dmmd', 'not recorded')})"
        )
    return config


def recipe_from_plain(content: dict[str, Any], origin: str) -> Recipe:
    """Read a recipe that was written with every default.

    Raises:
        RecipeError: It does not fit this version.
    """
    source = Source(origin)
    problems = Problems(source)
    recipe = read_dataclass(Recipe, content, "", problems, "a recipe", internal={"source": source})
    problems.raise_if_any()
    assert isinstance(recipe, Recipe)
    return recipe


@dataclass(frozen=True)
class SavedModel:
    """A loaded model, ready to sample.

    Attributes:
        role: ``teacher`` or ``student``.
        denoiser: The model in evaluation mode.
        process: Its noise process.
        sampler: The recipe's sampler.
        codec: Turns tokens into media.
        spec: Sizes.
        trained_num_steps: Number of steps the student was trained for; None for a teacher.
        conditional: Whether it takes class labels.
        guidable: Whether it was trained to predict without a label as well, which guidance needs.
        name: Name of the recipe.
        any_length: Whether it can draw more tokens than it was trained on, block after block.
    """

    role: str
    denoiser: Denoiser
    process: Process
    sampler: Sampler
    codec: Codec
    spec: DataSpec
    trained_num_steps: int | None
    conditional: bool
    guidable: bool
    name: str
    any_length: bool = False

    def sample(
        self,
        num: int,
        *,
        steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        label: int | None = None,
        prompt: str = "",
        suffix: str = "",
        template: Tensor | None = None,
        length: int | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        batch_size: int = 256,
    ) -> Tensor:
        """Draw samples; the same seed gives the same samples whatever the batch size.

        Args:
            num: How many.
            steps: Sampling steps, for each block where the model has blocks; by default what the student was trained
                for.
            seed: Seed of all noise; 0 by default.
            generator: Gives the seed instead and moves on, so that every call draws other samples.
            label: Class label for all of them; None draws labels uniformly where the model takes them.
            prompt: Text that every sample begins with, for models of text.
            suffix: Text that every sample ends with.
            template: Given tokens, int64 ``[length]`` or ``[num, length]``, with `FREE` where the model fills in
                (`text_template` makes one of a prompt). The given tokens stay as they are; a model with blocks looks at
                those before and within a block, never at those behind it.
            length: Tokens per sample, where the model has blocks; by default as many as in its training.
            guidance: Scale of classifier-free guidance (`guide_log_probs`), applied before temperature and top-p, at
                two network calls a step; 1 is none. None leaves it to the recipe's sampler.
            temperature: Divides the log-probabilities of every prediction.
            top_p: Mass of the nucleus; tokens outside it are never drawn.
            batch_size: Samples per network call.

        Returns:
            Tokens, int64 ``[num, length]``, on the CPU; `codec` decodes them.

        Raises:
            ValueError: A label for a model without classes, one out of range, no number of steps, a length that the
                model cannot draw, guidance for a model that cannot be guided, a prompt for a model that does not speak
                text, a template of another shape or with tokens that the model does not have, both seed and
                generator, or both template and prompt or suffix.
        """
        steps = steps or self.trained_num_steps
        if not steps or steps < 1 or num < 1:
            raise ValueError(f"num and steps must be at least 1, got num={num}, steps={steps}")
        if label is not None and not self.conditional:
            raise ValueError(f"{self.name!r} was trained without class labels; leave the label out")
        if label is not None and not 0 <= label < (self.spec.num_classes or 0):
            raise ValueError(f"the label must be in 0..{(self.spec.num_classes or 0) - 1}, got {label}")
        if temperature <= 0 or not 0 < top_p <= 1:
            raise ValueError(f"temperature must be above 0 and top_p in (0, 1], got {temperature} and {top_p}")
        length = self.checked_length(length)
        if guidance is not None:
            self._check_guidance(guidance)
        if seed is not None and generator is not None:
            raise ValueError("seed and generator exclude each other; give one of them")
        if generator is not None:
            seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        if prompt or suffix:
            if template is not None:
                raise ValueError("a template and a prompt or suffix exclude each other; give one of them")
            template = self.text_template(prompt, suffix, length=length)
        if template is not None:
            template = self._checked_template(template, num, length)
        denoiser = self.denoiser
        if guidance is not None or temperature != 1.0 or top_p != 1.0:
            denoiser = ShapedDenoiser(
                denoiser,
                guidance=guidance,
                num_classes=self.spec.num_classes,
                temperature=temperature,
                top_p=top_p,
                lowering=math.inf,
            )
        device = next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))
        parts = []
        for start in range(0, num, batch_size):
            draws = Draws.for_range(seed or 0, 0, start, min(batch_size, num - start), device).within("sample")
            condition = self._condition(draws, label)
            if template is not None:
                given = template[start : start + draws.batch].to(device)
                condition = dataclasses.replace(condition, fixed=given != FREE, values=given.clamp_min(0))
            samples = self.sampler.sample(denoiser, draws, num_steps=steps, condition=condition, length=length)
            parts.append(samples.tokens.cpu())
        return torch.cat(parts)

    def checked_length(self, length: int | None) -> int:
        """Number of tokens to draw: `length`, or that of the training where it is None.

        Raises:
            ValueError: The model cannot draw so many.
        """
        trained = self.spec.length
        if length is None or length == trained:
            return trained
        if length < 1:
            raise ValueError(f"the length must be at least 1, got {length}")
        if self.denoiser.block_size is None or self.spec.grid is not None:
            what = "draws whole sequences" if self.spec.grid is None else "draws whole grids"
            raise ValueError(f"{self.name!r} {what} of {trained} tokens, got length {length}; leave the length out")
        if length > trained and not self.any_length:
            raise ValueError(
                f"{self.name!r} knows positions up to {trained}, got length {length}; ask for fewer tokens, or train "
                "a model without learned positions"
            )
        return length

    def text_template(self, prompt: str = "", suffix: str = "", *, length: int | None = None) -> Tensor:
        """Template that begins with a prompt and ends with a suffix, int64 ``[length]``.

        Raises:
            ValueError: The model does not speak text, cannot draw that length, or prompt and suffix leave nothing to
                fill in.
        """
        length = self.checked_length(length)
        if not isinstance(self.codec, TextCodec):
            raise ValueError(f"{self.name!r} does not speak text; give a template of tokens instead of a prompt")
        first, last = (self.codec.encode_text(text) for text in (prompt, suffix))
        free = length - len(first) - len(last)
        if free < 1:
            raise ValueError(
                f"prompt and suffix have {len(first) + len(last)} tokens and leave nothing of {length} to fill in"
            )
        tokens = [*map(int, first), *[FREE] * free, *map(int, last)]
        return torch.tensor(tokens, dtype=torch.int64)

    def _check_guidance(self, guidance: float) -> None:
        if guidance < 0:
            raise ValueError(f"guidance must be at least 0, got {guidance}")
        if guidance != 1.0 and not self.guidable:
            why = (
                "a student has absorbed its teacher's guidance in distillation; leave guidance out"
                if self.role == "student"
                else "this teacher never saw 'no label' in training; train it with label dropout, or leave guidance out"
            )
            raise ValueError(f"{self.name!r} cannot be guided: {why}")

    def _checked_template(self, template: Tensor, num: int, length: int) -> Tensor:
        vocab_size = self.spec.vocab_size
        if template.is_floating_point() or tuple(template.shape) not in ((length,), (num, length)):
            raise ValueError(
                f"the template must be whole numbers of shape [{length}] or [{num}, {length}], got {template.dtype} of "
                f"shape {list(template.shape)}"
            )
        if int(template.min()) < FREE or int(template.max()) >= vocab_size:
            raise ValueError(
                f"the template's tokens must be in 0..{vocab_size - 1}, or {FREE} where the model fills in, got "
                f"{int(template.min())}..{int(template.max())}"
            )
        return template.long().expand(num, length)

    def _condition(self, draws: Draws, label: int | None) -> Condition:
        if not self.conditional:
            return Condition()
        if label is None:
            return Condition(label=draws.integers("label", self.spec.num_classes or 1))
        return Condition(label=torch.full((draws.batch,), label, device=draws.device))


def load_student(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    registry: Registry | None = None,
    revision: str | None = None,
) -> SavedModel:
    """Load the student of a run, or one from the Hugging Face hub.

    Args:
        path: A run directory, its ``student`` folder, or a repository of the hub, ``owner/name``.
        device: Where to put the model.
        registry: The components; all installed plugins by default.
        revision: Branch, tag or commit on the hub.

    Raises:
        CheckpointError: The folder is missing or damaged, or its weights do not fit.
        RecipeError: A component that it needs is not installed.
    """
    return _load(_folder(path, "student", revision), "student", device, registry)


def load_teacher(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    registry: Registry | None = None,
    revision: str | None = None,
) -> SavedModel:
    """Load the teacher that a run trained; arguments and errors as for `load_student`."""
    return _load(_folder(path, "teacher", revision), "teacher", device, registry)


def upload_model(
    path: str | Path, repository: str, *, role: Role = "student", private: bool = True, revision: str | None = None
) -> str:
    """Upload a model folder to the Hugging Face hub, where `load_student` and `load_teacher` find it by name.

    The folder goes up as it is: weights, codec, ``config.json`` and card, in which the recipe stands with its paths.

    Args:
        path: A run directory or a model folder.
        repository: ``owner/name``; made where it is missing.
        role: Which model of the run.
        private: Whether a new repository is private.
        revision: Branch to upload to.

    Returns:
        The address of the repository.

    Raises:
        CheckpointError: The folder is missing or damaged, or holds the other model.
        RunError: The hub is out of reach, or refuses.
    """
    folder = _folder(path, role)
    config = read_config(folder)
    if config["role"] != role:
        raise CheckpointError(f"{folder} holds a {config['role']}, not a {role}")
    if not (folder / CARD).exists():  # of a run that was made before there were cards
        write_card(folder, ())
    message = f"{role} of {config['recipe']['name']}"
    return upload_folder(folder, repository, private=private, revision=revision, message=message)


def _folder(path: str | Path, role: str, revision: str | None = None, *, cached: bool = False) -> Path:
    """The model folder that is meant: of a run directory, itself, or of the hub."""
    path = Path(path)
    if not path.exists() and may_be_repository(path):
        try:
            return download_folder(str(path), revision, cached=cached)
        except RunError as error:
            raise CheckpointError(
                f"there is no model folder {path}, and {error}; give a run directory, its teacher or student folder, "
                "or a name on the hub"
            ) from error
    return path / role if (path / role).is_dir() or not (path / "config.json").exists() else path


def load_model_weights(path: str | Path, role: Role, denoiser: Denoiser, codec: Codec) -> None:
    """Load the weights of a model folder strictly into a denoiser built elsewhere.

    Args:
        path: A run directory or a model folder.
        role: What the model must be.
        denoiser: Takes the weights.
        codec: Must have the fingerprint of the codec that the model was trained with.

    Raises:
        CheckpointError: The folder is missing, damaged, speaks other tokens, its weights do not fit, or would fit but
            belong to a backbone with other settings.
    """
    folder = _folder(path, role)
    config = read_config(folder)
    if config["role"] != role:
        raise CheckpointError(f"{folder} holds a {config['role']}, not a {role}")
    if config["codec_fingerprint"] != codec.fingerprint():
        raise CheckpointError(
            f"{folder} was trained on tokens of codec {config['codec_fingerprint']}, the data of this recipe speaks "
            f"{codec.fingerprint()}"
        )
    load_weights(denoiser, load_tensors(folder / "model.safetensors"), str(folder / "model.safetensors"))
    backbone = getattr(denoiser, "backbone", None)
    differing = _differing_settings(config["recipe"]["backbone"], getattr(backbone, "config", None))
    if differing:
        raise CheckpointError(
            f"the weights in {folder} were trained with {'; '.join(differing)}; set the recipe's backbone to what they "
            "were trained with"
        )


def _differing_settings(saved: dict[str, Any], config: Any) -> list[str]:
    """Where a saved backbone's parameters and a Config differ, for the reader; not in fields that may."""
    if not dataclasses.is_dataclass(config):
        return []
    found = []
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        before, now = (
            dataclasses.asdict(value) if isinstance(value, Slot) else value
            for value in (saved["params"].get(field.name, default), getattr(config, field.name))
        )
        if before != now and not field.metadata.get("same_weights"):
            found.append(f"{field.name}: {before} where this recipe has {now}")
    return found


def saved_capabilities(path: str | Path, role: Role) -> frozenset[str] | None:
    """Capabilities that the training of a saved model gave it; None where there is no such model to be read.

    Args:
        path: A run directory or a model folder.
        role: What the model must be.
    """
    try:
        config = json.loads((_folder(path, role, cached=True) / "config.json").read_text(encoding="utf-8"))
        return frozenset(config.get("capabilities", ()))
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None  # whoever loads it will say what is wrong


def plan_of(config: dict[str, Any], origin: str, registry: Registry) -> Plan:
    """Resolve the recipe in a model folder's config.

    Raises:
        RecipeError: A component is missing; names who provided it when the model was saved.
    """
    recipe = recipe_from_plain(config["recipe"], origin)
    # Who samples needs no metrics; they may come from packages that are not installed here.
    recipe = dataclasses.replace(recipe, evaluate=dataclasses.replace(recipe.evaluate, metrics=[]), observers=[])
    try:
        return resolve(recipe, registry, outside=False)  # a saved model needs no data, nor what it was trained from
    except RecipeError as error:
        providers = "; ".join(f"{name} from {provider}" for name, provider in sorted(config["providers"].items()))
        hint = Problem("", f"the model was saved with these components: {providers}", origin)
        raise RecipeError([*error.problems, hint]) from error


def load_codec(folder: Path, assembly: Assembly, codec: Codec, fingerprint: str) -> Codec:
    """Restore a codec's state and check that it is the one the model was trained with."""
    codec.load_state(load_tensors(folder / "codec.safetensors"))
    if codec.fingerprint() != fingerprint:
        raise CheckpointError(
            f"the codec in {folder} has fingerprint {codec.fingerprint()}, but the model was trained with {fingerprint}"
        )
    return codec


def _load(folder: Path, role: Role, device: str | torch.device, registry: Registry | None) -> SavedModel:
    config = read_config(folder)
    if config["role"] != role:
        raise CheckpointError(f"{folder} holds a {config['role']}, not a {role}")
    plan = plan_of(config, str(folder / "config.json"), registry or load_plugins())
    assembly = Assembly(plan)
    spec = assembly.spec
    assert spec is not None
    if json.loads(json.dumps(dataclasses.asdict(spec))) != config["spec"]:
        raise CheckpointError(f"{folder} was saved with sizes {config['spec']}, its recipe now gives {spec}")
    codec = load_codec(folder, assembly, assembly.data.codec, config["codec_fingerprint"])
    backbone = assembly.backbone()
    denoiser: Denoiser = assembly.network() if role == "teacher" else assembly.generator(backbone)
    load_weights(denoiser, load_tensors(folder / "model.safetensors"), str(folder / "model.safetensors"))
    return SavedModel(
        role=role,
        denoiser=denoiser.to(device).eval().requires_grad_(False),
        process=assembly.process,
        sampler=assembly.sampler if role == "student" else assembly.teacher_sampler,
        codec=codec,
        spec=spec,
        trained_num_steps=config.get("trained_num_steps"),
        conditional="labels" in plan.backbone.provides(),
        guidable="unlabelled" in config.get("capabilities", ()),
        name=plan.recipe.name,
        any_length="any_length" in plan.backbone.provides(),
    )
