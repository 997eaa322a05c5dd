"""A run: its directory, and its stages data, teacher, initialize, distill, evaluate."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from dmmd_core.assemble import Assembly
from dmmd_core.checkpoint import (
    load_tensors,
    load_weights,
    save_tensors,
    verify_directory,
    write_directory,
    write_text,
)
from dmmd_core.compilation import compile_units, compiler_problem, units_of
from dmmd_core.distributed import join_processes, own_device
from dmmd_core.draws import Draws
from dmmd_core.errors import (
    CheckpointError,
    Interrupted,
    PeerLostError,
    Problem,
    RecipeError,
    RunError,
    ToldElsewhereError,
)
from dmmd_core.interfaces import Batch, Condition, Denoiser, Metric, NetworkDenoiser, Sampler, Subject, Value
from dmmd_core.media import readable
from dmmd_core.precision import AutocastSampler, choose_device, choose_precision, tf32_matrix_products
from dmmd_core.profiling import FOLDER, Profiler
from dmmd_core.recipe import TrainSection
from dmmd_core.records import (
    CACHE,
    METRICS,
    PLUGINS,
    RECIPE,
    STAGES,
    read_record,
    state_of,
    sum_of_recipe,
    write_record,
)
from dmmd_core.registry import Registry
from dmmd_core.resolve import Part, Plan
from dmmd_core.saved import Role, package_versions, read_config, save_model, write_card
from dmmd_core.soundness import CheckedSampler, check_batch, check_facts, check_values
from dmmd_core.train import Trainer

METRICS_SCHEMA = 1
_LOOKED_AT = 16  # examples of each split, before anything is trained
_EVALUATE = "evaluate"
_SAMPLES_SHOWN = 64  # to observers


class Run:
    """One run of a recipe in its directory; also what observers see.

    Attributes:
        plan: The resolved recipe.
        registry: The components and hooks.
        directory: The run directory.
        assembly: Builds components; ``assembly.data``, ``assembly.process`` and ``assembly.sampler`` exist at once.
        stage: Name of the current stage.
        stage_steps: Number of steps of the current stage.
        processes: This process among those that work on the run; observers live in the first.
        observers: Those of the recipe; none in the other processes.
        sharded: Whether networks are cut over the processes in training.
        choices: What backbone and engine chose and a reader should see, such as the attention kernel.
        engine: Every choice of the engine, for the log.
        stages: Finished stages: name to ``{"seconds": ..., "results": {...}}``.
        metrics: The content of ``metrics.json``.
        stop_requested: Set by a signal handler; the run stops at the next step with a checkpoint.
        quiet: Whether observers should print nothing; logs and reports are written all the same.
        profiler: Writes traces of a few steps; None where that was not asked for, or not of this process.
    """

    def __init__(self, plan: Plan, registry: Registry, *, quiet: bool = False, profile: bool = False) -> None:
        self.plan = plan
        self.registry = registry
        recipe = plan.recipe
        self.seed = recipe.run.seed
        self.device = own_device(choose_device(recipe.run.device))
        self.processes = join_processes(self.device)
        self.sharded = recipe.run.parallel == "fsdp" and not self.processes.alone
        self.precision = choose_precision(recipe.run.precision, self.device)
        self.directory = Path(recipe.run.directory)
        self.stage = ""
        self.stage_steps = 0
        self.stages: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {"schema": METRICS_SCHEMA, "facts": {}, "results": [], "timing": {}}
        self.stop_requested = False
        self.quiet = quiet or not self.processes.is_main
        self.say: Callable[[str], None] = lambda text: None if self.quiet else print(text, file=sys.stderr)
        wanted = profile and self.processes.is_main
        folder = self.directory / FOLDER
        self.profiler = Profiler(folder, self.device, lambda text: self.say(text)) if wanted else None
        # Everything is built once, cheaply, before a byte is written: what cannot work is refused here.
        self.assembly = Assembly(plan, self.directory / CACHE)
        self.samplers = {
            "student": self._watched("student", self.assembly.sampler),
            "teacher": self._watched("teacher", self.assembly.teacher_sampler),
        }
        self.observers = self.assembly.observers(self.directory) if self.processes.is_main else []
        self._dry_build()
        self._refuse_what_cannot_work()

    def _watched(self, model: str, sampler: Sampler) -> CheckedSampler:
        assert self.assembly.spec is not None
        recipe = self.plan.recipe
        slot = (model == "teacher" and recipe.evaluate.teacher_sampler) or recipe.sampler
        inner = AutocastSampler(sampler, self.device, self.precision)
        return CheckedSampler(inner, slot.name, model, self.assembly.spec)

    # ---- what observers hear --------------------------------------------------------------------------------

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Tell the observers about a step."""
        if self.processes.is_main:
            self.registry.hooks.dmmd_after_step(run=self, step=step, metrics=metrics)
        for observer in self.observers if self.stage != _EVALUATE else ():
            observer.on_step(self.stage, step, metrics)

    def after_checkpoint(self, step: int, path: Path) -> None:
        """Tell the observers about a checkpoint."""
        if self.processes.is_main:
            self.registry.hooks.dmmd_after_checkpoint(run=self, step=step, path=path)
        for observer in self.observers:
            observer.on_checkpoint(self.stage, step, path)

    def warn(self, step: int, message: str) -> None:
        """Say that somebody should look, and tell the observers."""
        self.say(f"{self.stage}: {message}")
        if self.processes.is_main:
            self.registry.hooks.dmmd_on_warning(run=self, step=step, message=message)
        for observer in self.observers:
            observer.on_warning(self.stage, step, message)

    # ---- the run --------------------------------------------------------------------------------------------

    def execute(self) -> None:
        """Run all stages that are not finished yet.

        Raises:
            RunError: The directory belongs to another recipe or to something else.
            Interrupted: `stop_requested` was set; everything done so far is safe.
        """
        lock = FileLock(self.directory / ".lock")
        self.stages, self.metrics = self.processes.from_main(lambda: self._open_directory(lock))
        error: BaseException | None = None
        own_threads = torch.get_num_threads()
        torch.set_num_threads(self.plan.recipe.run.threads or own_threads)
        try:
            with tf32_matrix_products(self.plan.recipe.run.tf32, self.device):
                if self.processes.is_main:
                    self.registry.hooks.dmmd_before_run(run=self)
                for observer in self.observers:
                    observer.begin()
                self._stages()
            if self.profiler is not None:
                self.profiler.finish()
            self.processes.leave()
        except PeerLostError as caught:
            error = caught
            # The first process holds the lock while it lives, and tells; where it is gone, one of the others does.
            if not self.processes.is_main and not _can_hold(lock):
                raise ToldElsewhereError(str(caught), caught.exit_code) from caught
            raise
        except BaseException as caught:
            error = caught
            raise
        finally:
            torch.set_num_threads(own_threads)
            if self.processes.is_main:
                lock.release()
            with ExitStack() as ends:
                for observer in self.observers:
                    ends.callback(observer.end, error)
                if self.processes.is_main:
                    self.registry.hooks.dmmd_after_run(run=self, error=error)

    def _stages(self) -> None:
        self._run_stage("data", 1, self._prepare_data)
        teacher, start = self._teacher()
        student = self._distill(teacher, start)
        self._evaluate(teacher, student)

    def _teacher(self) -> tuple[Denoiser, NetworkDenoiser]:
        """The teacher, and the network whose weights student and auxiliary start from."""
        recipe, plan = self.plan.recipe, self.plan
        if plan.teacher_load is None:
            assert recipe.teacher.train is not None
            assert plan.teacher_objective is not None
            network = self.assembly.network()
            trained = self._train_stage("teacher", plan.teacher_objective, recipe.teacher.train, network, None, None)
            return trained, cast("NetworkDenoiser", trained)
        teacher = self.processes.main_first(self.assembly.teacher)
        teacher = (teacher if self.sharded else teacher.to(self.device)).eval().requires_grad_(False)
        if plan.initialize_objective is None:
            return teacher, cast("NetworkDenoiser", teacher)
        section = recipe.distill.initialize
        assert section is not None
        network = self.assembly.network()
        start = self._train_stage("initialize", plan.initialize_objective, section, network, teacher, None)
        return teacher, cast("NetworkDenoiser", start)

    def _distill(self, teacher: Denoiser, start: NetworkDenoiser) -> Denoiser:
        section = self.plan.recipe.distill

        def copy_teacher() -> Denoiser:
            return copy.deepcopy(start).requires_grad_(True)

        generator = self.assembly.generator(copy.deepcopy(start.backbone).requires_grad_(True))
        return self._train_stage("distill", self.plan.objective, section, generator, teacher, copy_teacher)

    def _train_stage(
        self,
        stage: str,
        part: Part,
        section: TrainSection,
        network: Denoiser,
        teacher: Denoiser | None,
        copy_teacher: Callable[[], Denoiser] | None,
    ) -> Denoiser:
        """Train, or load what was trained before; returns the averaged model on the run's device."""
        folder = self.directory / {"teacher": "teacher", "distill": "student"}.get(stage, stage)
        if stage not in self.stages or not self._is_whole(folder):

            def train() -> dict[str, Any]:
                num_steps = self.plan.recipe.distill.num_steps if stage == "distill" else None
                objective = self.assembly.objective(
                    part,
                    # What is sharded stays so; the whole networks are needed again.
                    network=copy.deepcopy(network) if self.sharded else network,
                    teacher=copy.deepcopy(teacher) if self.sharded else teacher,
                    copy_teacher=copy_teacher,
                    num_steps=num_steps,
                    training_steps=section.steps,
                )
                trained = Trainer(self, stage, objective, section, self.directory / "checkpoints" / stage).train()
                role: Role = "student" if stage == "distill" else "teacher"
                facts = {
                    "trained_num_steps": num_steps,
                    "ema": section.ema > 0,
                    "training_steps": section.steps,
                    "capabilities": sorted(part.provides()),
                }
                save_model(folder, role, trained.model, self.assembly, facts, self.processes)
                return {**trained.metrics, "seconds": trained.seconds}

            self._run_stage(stage, section.steps, train)
        read_config(folder)
        load_weights(network, load_tensors(folder / "model.safetensors"), str(folder))
        # Where networks are sharded, a whole one comes to the device when it is asked for samples.
        return (network if self.sharded else network.to(self.device)).eval().requires_grad_(False)

    def _is_whole(self, folder: Path) -> bool:
        """Whether a finished stage's model is undamaged; says what is wrong with it."""
        try:
            read_config(folder)
        except CheckpointError as error:
            self.say(f"{error}; it is made again from the stage's checkpoints")
            return False
        return True

    def _run_stage(self, stage: str, steps: int, work: Callable[[], dict[str, Any]]) -> None:
        """Do a stage's work once; its results survive on disk. Data are prepared in every process anew."""
        self.stage, self.stage_steps = stage, steps
        started = time.monotonic()
        results = work()
        if stage in self.stages:
            return
        seconds = results.pop("seconds", time.monotonic() - started)
        self.stages[stage] = {"seconds": seconds, "results": results}
        self.metrics["timing"][stage] = round(seconds, 3)
        self.processes.from_main(lambda: self._keep_stage(stage, results))

    def _keep_stage(self, stage: str, results: dict[str, Any]) -> None:
        write_record(self.directory / METRICS, self.metrics)
        write_record(self.directory / STAGES, self.stages)
        self.registry.hooks.dmmd_after_stage(run=self, stage=stage, results=results)
        for observer in self.observers:
            observer.on_stage(stage, self.stages[stage]["seconds"])

    def _prepare_data(self) -> dict[str, Any]:
        data = self.assembly.data
        self.processes.main_first(data.prepare)
        for split in ("train", "test"):
            count = min(data.size(split), _LOOKED_AT)
            batch = data.take(split, torch.arange(count))
            check_batch(batch, data.spec, count, f"data {self.plan.data.entry.name}, split {split}")
        facts = data.facts()
        check_facts(facts, f"data {self.plan.data.entry.name}")
        self.metrics["facts"].update(facts)
        for name, value in facts.items():
            self.say(f"  {name.replace('_', ' ')}: {value:.4g}")
        results = json.loads(json.dumps({**asdict(data.spec), "codec_fingerprint": data.codec.fingerprint()}))
        before = self.stages.get("data", {}).get("results", results)
        if before != results:
            raise RunError(f"the data of {self.directory} were {before} and are now {results}; start a new run")
        return cast("dict[str, Any]", results)

    # ---- evaluation -----------------------------------------------------------------------------------------

    def _evaluate(self, teacher: Denoiser, student: Denoiser) -> None:
        for model, steps in dict.fromkeys((row["model"], row["num_steps"]) for row in self.metrics["results"]):
            self._verified_samples(model, steps)
        if _EVALUATE in self.stages:
            return
        section = self.plan.recipe.evaluate
        jobs: list[tuple[str, int, Denoiser | None]] = [("train", 0, None), ("test", 0, None)]
        jobs += [("teacher", steps, teacher) for steps in sorted(section.teacher_steps)]
        jobs += [("student", steps, student) for steps in sorted(section.student_steps)]
        self._run_stage(_EVALUATE, len(jobs), lambda: self._judge(jobs))
        self.processes.from_main(self._write_cards)

    def _write_cards(self) -> None:
        for role in ("teacher", "student"):
            if (self.directory / role).is_dir():
                write_card(self.directory / role, self.metrics["results"])

    def _judge(self, jobs: list[tuple[str, int, Denoiser | None]]) -> dict[str, Any]:
        started = time.monotonic() - self.metrics["timing"].get("evaluate", 0.0)
        metrics = self.assembly.metrics()
        for part, metric in zip(self.plan.metrics, metrics, strict=True):
            facts = self.processes.main_first(metric.prepare)
            check_facts(facts, f"metric {part.entry.name}")
            self.metrics["facts"].update(facts)
        done = {(row["model"], row["num_steps"]) for row in self.metrics["results"]}
        for place, (model, steps, denoiser) in enumerate(jobs, start=1):
            if (model, steps) in done:
                continue
            rows = self._judge_one(metrics, model, steps, denoiser)
            # Before they are safe: what is told twice is known to be the same, and what is never told is missing.
            figures = [Value(**{field.name: row[field.name] for field in fields(Value)}) for row in rows]
            for observer in self.observers:
                observer.on_figures(model, steps, figures)
            self.metrics["results"].extend(rows)
            self.metrics["timing"]["evaluate"] = round(time.monotonic() - started, 3)
            self.processes.from_main(lambda: write_record(self.directory / METRICS, self.metrics))
            self.after_step(place, {f"{row['metric']}": row["value"] for row in rows})
        return {"seconds": time.monotonic() - started}

    def _judge_one(
        self, metrics: list[Metric], model: str, steps: int, denoiser: Denoiser | None
    ) -> list[dict[str, Any]]:
        section, recipe = self.plan.recipe.evaluate, self.plan.recipe
        trained_steps = recipe.distill.num_steps if model == "student" else None
        if denoiser is None:
            batch = self._yardstick(model)
        else:
            denoiser = denoiser.to(self.device)
            if recipe.run.compile:
                compile_units(denoiser)
            started = time.monotonic()
            batch = self._sample(model, denoiser, steps, section.num_samples)
            seconds = time.monotonic() - started
            self.metrics["timing"].setdefault("sampling", {})[f"{model}_{steps}"] = round(seconds, 3)
        self.processes.from_main(lambda: self._keep_samples(model, steps, batch))
        for observer in self.observers:
            observer.on_samples(model, steps, readable(self.assembly.data.codec, batch.tokens[:_SAMPLES_SHOWN]))
        draws = Draws.for_range(self.seed, 0, 0, 1, self.device).within("evaluate/metric")
        subject = Subject(
            model=model,
            num_steps=steps,
            tokens=batch.tokens,
            labels=batch.labels,
            denoiser=denoiser,
            sampler=self.samplers.get(model),
            process=self.assembly.process,
            draws=draws,
        )
        shared = {
            "model": model,
            "num_steps": steps,
            "trained_num_steps": trained_steps,
            "seed": self.seed,
            "sampler": self._sampler_name(model),
            "dtype": str(self.precision).removeprefix("torch."),
            "ema": self._uses_average(model),
        }
        # Every process has all samples and a whole model, and judges by every so many-th metric.
        found: dict[int, list[dict[str, Any]]] = {}
        for place in range(self.processes.rank, len(metrics), self.processes.size):
            found[place] = []
            values = metrics[place].evaluate(subject)
            check_values(values, self.plan.metrics[place].entry.name, f"{model}, {steps} steps")
            for value in values:
                found[place].append({**shared, **asdict(value)})
                self._stop_if_asked(alone=True)
        self._stop_if_asked()
        together = {place: rows for part in self.processes.gather(found) for place, rows in part.items()}
        return [row for place in sorted(together) for row in together[place]]

    def _sampler_name(self, model: str) -> str | None:
        if model not in self.samplers:
            return None
        recipe = self.plan.recipe
        return ((model == "teacher" and recipe.evaluate.teacher_sampler) or recipe.sampler).name

    def _sample(self, model: str, denoiser: Denoiser, steps: int, num: int) -> Batch:
        """Draw samples in batches, each process its part; labels follow the data where the model takes them."""
        tokens, labels = [], []
        conditional = "labels" in self.plan.backbone.provides()
        size = self.assembly.data.size("train") if conditional else 0
        mine = self.processes.share(num)
        for start in range(mine.start, mine.stop, self.plan.recipe.evaluate.batch_size):
            count = min(self.plan.recipe.evaluate.batch_size, mine.stop - start)
            draws = Draws.for_range(self.seed, 0, start, count, self.device).within("evaluate")
            condition = Condition()
            if conditional:
                chosen = self.assembly.data.take("train", draws.integers("label", size).cpu()).labels
                if chosen is not None:
                    condition = Condition(label=chosen.to(self.device))
                    labels.append(chosen)
            with self._profiled_sampling(model, steps):
                samples = self.samplers[model].sample(denoiser, draws, num_steps=steps, condition=condition)
            tokens.append(samples.tokens.cpu())
            self._stop_if_asked(alone=True)
        self._stop_if_asked()
        parts = self.processes.gather((tokens, labels))
        tokens, labels = ([piece for part in parts for piece in part[place]] for place in (0, 1))
        return Batch(torch.cat(tokens), torch.cat(labels) if labels else None)

    def _profiled_sampling(self, model: str, steps: int) -> AbstractContextManager[None]:
        """Context of a sampling call: with ``--profile`` the first one of the student is traced, or of the teacher."""
        role = "student" if self.plan.recipe.evaluate.student_steps else "teacher"
        profiler = self.profiler
        if profiler is None or model != role or any(name.startswith("sampling") for name in profiler.traced):
            return nullcontext()
        return profiler.call(f"sampling_{model}_{steps}")

    def _yardstick(self, split: str) -> Batch:
        """Real data seen through the codec: what a perfect model of the tokens would score."""
        size = self.assembly.data.size(split)
        num = min(self.plan.recipe.evaluate.num_samples, size)
        chosen = Draws.for_range(self.seed, 0, 0, size).uniform("yardstick").argsort(stable=True)[:num]
        batch = self.assembly.data.take(split, chosen)
        check_batch(batch, self.assembly.data.spec, num, f"data {self.plan.data.entry.name}, split {split}")
        return batch

    def _keep_samples(self, model: str, steps: int, batch: Batch) -> None:
        folder = self.directory / "samples"
        folder.mkdir(exist_ok=True)
        tensors: dict[str, Tensor] = {"tokens": batch.tokens}
        if batch.labels is not None:
            tensors["labels"] = batch.labels
        write_directory(folder / f"{model}_{steps}", lambda path: save_tensors(path / "samples.safetensors", tensors))

    def samples(self, model: str, steps: int) -> Batch | None:
        """Samples kept by the evaluation, or None.

        Raises:
            CheckpointError: They are damaged; says how to have them made again.
        """
        folder = self._verified_samples(model, steps)
        if folder is None:
            return None
        tensors = load_tensors(folder / "samples.safetensors")
        return Batch(tensors["tokens"], tensors.get("labels"))

    def _verified_samples(self, model: str, steps: int) -> Path | None:
        folder = self.directory / "samples" / f"{model}_{steps}"
        if not folder.exists():
            return None
        try:
            verify_directory(folder)
        except CheckpointError as error:
            remedy = f"remove {self.directory / METRICS}, and the same command evaluates again"
            raise CheckpointError(f"{error}; {remedy}") from error
        return folder

    def _uses_average(self, model: str) -> bool | None:
        recipe = self.plan.recipe
        section = {"teacher": recipe.teacher.train, "student": recipe.distill}.get(model)
        return None if section is None else section.ema > 0

    def _stop_if_asked(self, alone: bool = False) -> None:
        """Stop if any process was asked to, at a place that all pass; an `alone` one stops at once, others later."""
        if (not alone or self.processes.alone) and self.processes.any(self.stop_requested):
            raise self.processes.agreed(Interrupted(f"stopped during {self.stage}; run the same command to go on"))

    # ---- the directory --------------------------------------------------------------------------------------

    def _open_directory(self, lock: FileLock) -> tuple[dict[str, Any], dict[str, Any]]:
        """Create the run directory, or check that it belongs to this very recipe; returns stages and metrics so far."""
        directory, recipe = self.directory, self.plan.recipe
        state = state_of(directory, recipe)
        try:
            (directory / CACHE).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run.directory: {directory} cannot be created: {error.strerror}") from error
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise RunError(
                f"run.directory: another process is working in {directory}; wait for it, or choose another directory"
            ) from error
        if state != "kept":
            if state == "damaged":
                self.say(f"{directory / RECIPE} is damaged; it is written anew: the run began with the recipe given")
            write_text(directory / RECIPE, yaml.safe_dump(recipe.plain(), sort_keys=False))
        if read_record(directory / PLUGINS) is None:
            write_record(directory / PLUGINS, self._versions())
        stages = read_record(directory / STAGES) or self.stages
        metrics = read_record(directory / METRICS)
        if metrics is None:
            # The figures are made again; the times of what was finished are known.
            stages.pop("evaluate", None)
            metrics = self.metrics
            metrics["timing"] = {name: round(stage["seconds"], 3) for name, stage in stages.items()}
        return stages, metrics

    def _versions(self) -> dict[str, Any]:
        return {
            "recipe": sum_of_recipe(self.plan.recipe),
            "packages": package_versions(),
            "plugins": [asdict(provider) for provider in self.registry.providers],
            "components": {f"{p.entry.kind}:{p.entry.name}": p.entry.provider.plugin for p in self.plan.parts()},
        }

    def _refuse_what_cannot_work(self) -> None:
        """Refuse choices of the engine that this backbone or machine cannot serve; the others become `engine`."""
        recipe = self.plan.recipe
        section, where = recipe.run, recipe.source.where
        problems = []
        for key in ("compile", "activation_checkpointing"):
            if getattr(section, key) and not self.num_units:
                message = f"works on blocks, and backbone {recipe.backbone.name} names none (units); set it to false"
                problems.append(Problem(f"run.{key}", message, where(f"run.{key}")))
        if section.compile and (problem := compiler_problem(self.device)):
            problems.append(Problem("run.compile", problem, where("run.compile")))
        if problems:
            raise RecipeError(problems)
        switches = {
            "tf32": section.tf32 and self.device.type == "cuda",
            "compile": section.compile,
            "activation_checkpointing": section.activation_checkpointing,
        }
        self.engine = {name: "on" if value else "off" for name, value in switches.items()}
        size = self.processes.size
        self.engine["processes"] = str(size) if size == 1 else f"{size} ({section.parallel})"
        if size > 1:
            self.choices["processes"] = self.engine["processes"]
        self.engine["threads"] = str(section.threads or torch.get_num_threads())
        for name, train in recipe.training_sections().items():
            self.engine[f"{name}.accumulate"] = str(train.accumulate)
            fused = train.optimizer.fused
            fused = self.device.type == "cuda" if fused is None else fused
            self.engine[f"{name}.fused_optimizer"] = "on" if fused else "off"
        self.choices |= {name.replace("_", " "): "on" for name, value in switches.items() if value}

    def _dry_build(self) -> dict[str, int]:
        """Build all networks on the meta device; returns their numbers of parameters."""
        with torch.device("meta"):
            network = self.assembly.network()
            generator = self.assembly.generator(network.backbone)
        self.choices = network.backbone.description()
        self.num_units = len(list(units_of(network)))
        self.sizes = {
            "teacher": sum(p.numel() for p in network.parameters()),
            "student": sum(p.numel() for p in generator.parameters()),
        }
        return self.sizes


def _can_hold(lock: FileLock) -> bool:
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    return True
