"""Compare distillation methods on one teacher, at equal iterations and at equal network passes.

    python benchmarks/compare.py coins
    python benchmarks/compare.py digits_masked digits_uniform text --form gpu

A task of the small form takes less than half an hour on two CPU cores, where two runs go on side by side.

For every task each method is tuned over the same learning rates, on the first seed and by the task's main metric at
the number of steps it was trained for; with the best one it is run on all seeds, for as many iterations as every other
method and for as many network passes. A forward pass counts one, a forward and backward pass three. Teacher, data,
networks, batch size, schedule of the learning rate and moving average are those of the task's recipe.

Every run has a directory of its own below ``--runs``; the same command goes on where it stopped. What evaluation fits
(codec, classifier, reference) is that of the first run, which also measures the teacher. The result of a task
goes to ``benchmarks/results/compare_<task>_<form>.json`` and ``docs/images/compare_<task>_<form>.png``, a table to the
terminal; ``--collect`` makes these of finished runs alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
LEARNING_RATES = [3e-4, 1e-3, 3e-3]
BUDGETS = ["iterations", "passes"]
REFERENCE = "moment_matching"  # its passes are everybody's


@dataclass(frozen=True)
class Method:
    """How a method enters a recipe.

    Attributes:
        params: Of its objective; those of the recipe where None.
        passes: Network passes of a step, averaged over its turns.
        noise: Processes it is for.
        beta1: Of Adam: 0 for games of two players, 0.9 else.
        generator: Replaces the recipe's; ``initial_scale`` and ``width`` are taken over from it.
        num_steps: Replaces the recipe's.
    """

    params: dict[str, Any] | None
    passes: float
    noise: tuple[str, ...]
    beta1: float
    generator: str | None = None
    num_steps: int | None = None


METHODS: dict[str, Method] = {
    "moment_matching": Method(None, 7, ("masked", "uniform"), 0.0),
    "sdtt": Method({"rounds": 3, "teacher_steps": 2}, 3 + 2, ("masked",), 0.9),
    # Two turns of the auxiliary (student 1, auxiliary 3) and one of the student (3, teacher 1, auxiliary 1).
    "dimo": Method({"auxiliary_turns": 2}, (2 * 4 + 5) / 3, ("masked",), 0.0, "partly_random", 1),
    "idlm": Method({"auxiliary_turns": 1}, (4 + 5) / 2, ("masked",), 0.0),
    # Student at z_t and, without gradient, below it, both with every latent.
    "di4c": Method({"latents": 4}, 4 * (3 + 1) + 1, ("masked", "uniform"), 0.9),
    "dcd": Method({"rounds": 3}, 3 + 1, ("uniform",), 0.9),
}


@dataclass(frozen=True)
class Task:
    """A recipe and how its figures are read.

    Attributes:
        recipe: File below ``recipes/``.
        metric: Main metric; smaller is better.
        also: Further metrics of the table.
        student_steps: Numbers of steps that students are sampled with.
        teacher_steps: The same for the teacher.
        sizes: By form, what replaces the recipe's values.
        params: By method, what replaces its parameters.
    """

    recipe: str
    metric: str
    also: tuple[str, ...]
    student_steps: tuple[int, ...]
    teacher_steps: tuple[int, ...]
    sizes: dict[str, dict[str, Any]] = field(default_factory=dict)
    params: dict[str, dict[str, Any]] = field(default_factory=dict)


_EXACT_CPU = {
    "distill.steps": 2000, "distill.batch_size": 128, "distill.initialize.steps": 500,
    "distill.initialize.batch_size": 128, "evaluate.num_samples": 500,
    "evaluate.metrics": [{"name": "total_variation", "params": {"num_samples": 10_000}}, {"name": "product_bound"}],
}  # fmt: skip
# Even steps, which every method practises, and the lengths of the recorded runs.
_TEXT = {
    "data.params.length": 48, "sampler": {"name": "ancestral"}, "evaluate.teacher_sampler": None,
    "distill.steps": 3500, "distill.num_steps": 8,
}  # fmt: skip
_DIGITS_CPU = {"distill.steps": 1000, "evaluate.num_samples": 1000}
# The paper's -0.2 rewards mass where an exact teacher has none: floored, log teacher - log auxiliary is largest there.
_EXACT_PARAMS = {"dimo": {"jeffreys_coefficient": 0.0}}
TASKS: dict[str, Task] = {
    "coins": Task(
        "exact_coins", "total_variation", (), (1, 2, 4, 8), (1, 2, 4, 8, 64), {"cpu": _EXACT_CPU}, _EXACT_PARAMS
    ),
    "markov_masked": Task(
        "exact_markov_masked", "total_variation", (), (1, 2, 4, 8), (1, 2, 4, 8, 64), {"cpu": _EXACT_CPU}, _EXACT_PARAMS
    ),
    "markov_uniform": Task(
        "exact_markov_uniform", "total_variation", (), (1, 2, 4, 8), (1, 2, 4, 8, 64), {"cpu": _EXACT_CPU}
    ),
    "digits_masked": Task(
        "quickstart", "frechet_distance", ("class_histogram_tv", "token_entropy"), (1, 2, 4, 8, 16), (4, 16, 64),
        {"cpu": _DIGITS_CPU},
    ),
    "digits_uniform": Task(
        "digits_uniform", "frechet_distance", ("class_histogram_tv", "token_entropy"), (1, 2, 4, 8, 16), (4, 16, 64),
        {"cpu": _DIGITS_CPU},
    ),
    "text": Task(
        "text_quickstart", "gradient_moment", ("token_entropy", "bigram_divergence"), (1, 4, 8, 16), (8, 16, 64),
        {"cpu": {**_TEXT, "distill.steps": 400, "evaluate.num_samples": 400}, "gpu": _TEXT},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One run."""

    method: str
    budget: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its directory."""
        return f"{self.method}-{self.budget}-{self.learning_rate:g}-{self.seed}"


def main() -> int:
    """Parse the command line, run everything, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS), help="what to compare on")
    parser.add_argument("--form", choices=["cpu", "gpu"], default="cpu", help="small runs, or those of the recipe")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS), help="A,B,C; all")
    parser.add_argument("--processes", type=int, help="runs side by side (default: cores for cpu, 1 for gpu)")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, ... (default: 2 for cpu, 3 for gpu)")
    parser.add_argument("--runs", type=Path, default=Path("runs/compare"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON goes")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "images", help="where the pictures go")
    parser.add_argument("--collect", action="store_true", help="run nothing; collect what is finished")
    options = parser.parse_args()
    unknown = sorted(set(options.methods) - set(METHODS))
    if unknown:
        parser.error(f"--methods knows {', '.join(METHODS)}, got {', '.join(unknown)}")
    for name in options.tasks:
        content = compare(name, options)
        stem = f"compare_{name}_{options.form}"
        write(options.out / f"{stem}.json", json.dumps(content, indent=1) + "\n")
        print("\n".join(table(content)))
        plot(content, options.plots / f"{stem}.png")
    return 0


def compare(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Make or collect all runs of a task."""
    task, folder = TASKS[name], options.runs / f"{name}_{options.form}"
    recipe = yaml.safe_load((ROOT / "recipes" / f"{task.recipe}.yaml").read_text(encoding="utf-8"))
    methods = [one for one in METHODS if one in options.methods and recipe["process"]["name"] in METHODS[one].noise]
    seeds = range(options.seeds or {"cpu": 2, "gpu": 3}[options.form])
    runs: dict[Job, dict[str, Any]] = {}
    first = Job(REFERENCE, "iterations", LEARNING_RATES[0], 0)  # its teacher is everybody's
    processes = options.processes or {"cpu": os.cpu_count() or 1, "gpu": 1}[options.form]

    def make(job: Job) -> None:
        base = None if job == first else folder / first.name
        made = make_recipe(task, recipe, job, options.form, folder / job.name, base)
        if options.collect:
            found = finished(folder / job.name)
        else:
            found = run_recipe(made, folder / job.name, base=base, alone=base is None or processes == 1)
        if found is not None:
            steps = made["distill"]["steps"]
            runs[job] = {
                **vars(job), "steps": steps, "passes": round(steps * METHODS[job.method].passes),
                "num_steps": made["distill"]["num_steps"], "results": found["results"], "timing": found["timing"],
            }  # fmt: skip

    def make_all(jobs: Sequence[Job]) -> None:
        missing = sorted((job for job in jobs if job not in runs), key=lambda job: -METHODS[job.method].passes)
        with ThreadPoolExecutor(processes) as pool:
            waiting = [pool.submit(make, job) for job in missing]
            try:
                for one in waiting:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # those under way come to their end, or were interrupted too
                raise

    make_all([first])
    tries = {method: [Job(method, "iterations", rate, 0) for rate in LEARNING_RATES] for method in methods}
    make_all([job for jobs in tries.values() for job in jobs])
    chosen = {method: tune(task, [runs[job] for job in jobs if job in runs]) for method, jobs in tries.items()}
    wanted = [
        Job(method, budget, rate, seed)
        for method, rate in chosen.items() if rate is not None
        for seed in seeds
        for budget in BUDGETS[: 1 if METHODS[method].passes == METHODS[REFERENCE].passes else 2]
    ]  # fmt: skip
    make_all(wanted)
    order = [first, *(job for jobs in tries.values() for job in jobs), *wanted]
    return {
        "task": name,
        "form": options.form,
        "metric": task.metric,
        "also": task.also,
        "recipe": f"recipes/{task.recipe}.yaml",
        "command": f"python benchmarks/compare.py {name} --form {options.form} --seeds {len(seeds)}",
        "commit": _commit(),
        "machine": {
            "cpu_count": os.cpu_count(), "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "platform": platform.machine(), "python": platform.python_version(),
        },
        "learning_rates": LEARNING_RATES,
        "chosen": chosen,
        "runs": [runs[job] for job in dict.fromkeys(order) if job in runs],
    }  # fmt: skip


def tune(task: Task, runs: Sequence[dict[str, Any]]) -> float | None:
    """The learning rate with the best main metric at the trained number of steps."""
    scores: dict[float, float] = {}
    for run in runs:
        value = figure(run, task.metric, "student", run["num_steps"])
        scores[run["learning_rate"]] = math.inf if value is None or math.isnan(value) else value
    return min(scores, key=lambda rate: scores[rate]) if scores else None


def make_recipe(
    task: Task, recipe: dict[str, Any], job: Job, form: str, directory: Path, teacher: Path | None
) -> dict[str, Any]:
    """The recipe of one run."""
    made = copy.deepcopy(recipe)
    method = METHODS[job.method]
    for key, value in task.sizes.get(form, {}).items():
        *path, last = key.split(".")
        section = made
        for part in path:
            section = section[part]
        section[last] = value
    made["name"] = f"compare_{directory.parent.name}_{job.name}"
    if teacher is not None and "load" not in made["teacher"]:
        made["teacher"] = {"load": {"name": "from_run", "params": {"path": str(teacher)}}}
    if method.params is not None:
        made["objective"] = {"name": job.method, "params": method.params | task.params.get(job.method, {})}
    own = made["generator"].get("params", {})
    if method.generator is not None:
        made["generator"] = {
            "name": method.generator, "params": {key: own[key] for key in ("width", "initial_scale") if key in own}
        }  # fmt: skip
    made["distill"]["num_steps"] = method.num_steps or made["distill"]["num_steps"]
    if job.budget == "passes":
        made["distill"]["steps"] = round(made["distill"]["steps"] * METHODS[REFERENCE].passes / method.passes)
    made["distill"]["optimizer"] |= {"learning_rate": job.learning_rate, "beta1": method.beta1}
    made["evaluate"]["student_steps"] = list(task.student_steps)
    if teacher is not None:  # told once
        made["evaluate"]["metrics"] = [one for one in made["evaluate"]["metrics"] if one["name"] != "product_bound"]
    made["evaluate"]["teacher_steps"] = list(task.teacher_steps) if teacher is None else []
    made["run"] = {**made["run"], "seed": job.seed, "directory": str(directory)}
    if form == "gpu":
        made["run"]["device"] = "cuda"
    return made


def run_recipe(
    made: dict[str, Any], directory: Path, *, base: Path | None = None, alone: bool = True
) -> dict[str, Any] | None:
    """Run or resume a recipe in a process of its own; None where its training broke down.

    Args:
        made: The recipe.
        directory: Where it runs.
        base: A finished run on the same data, which has fitted what evaluation needs.
        alone: No other run goes on beside it, and it may have all cores.
    """
    path, text = directory.parent / f"{directory.name}.yaml", yaml.safe_dump(made, sort_keys=False)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{path} is another recipe than this run's; choose another --runs, or remove it and its run")
    found = finished(directory)
    if found is None:
        write(path, text)
        if base is not None and (base / "cache").is_dir() and not directory.exists():
            shutil.copytree(base / "cache", directory / "cache")
        command = [sys.executable, "-m", "dmmd_core", str(path), "--quiet"]
        environment = os.environ | ({} if alone else {"OMP_NUM_THREADS": "1"})
        done = subprocess.run(command, cwd=Path.cwd(), env=environment, check=False)
        broke_down = done.returncode == 2 and (directory / "stages.json").exists()  # else it was refused
        if done.returncode != 0 and not broke_down:
            raise SystemExit(f"{path} was interrupted or broke; run the same command to go on")
        found = finished(directory)
        print(f"{directory.name}: {'done' if found else 'no result'}", file=sys.stderr, flush=True)
    return found


def finished(directory: Path) -> dict[str, Any] | None:
    """What a finished run measured, or None."""
    stages = directory / "stages.json"
    if not stages.exists() or "evaluate" not in json.loads(stages.read_text(encoding="utf-8")):
        return None
    content: dict[str, Any] = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
    return content


def figure(run: dict[str, Any], metric: str, model: str, steps: int) -> float | None:
    """One figure of a run."""
    for row in run["results"]:
        if (row["metric"], row["model"], row["num_steps"]) == (metric, model, steps):
            return float(row["value"])
    return None


def rows_of(content: dict[str, Any]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """Label, budget and runs over the seeds of every line of a table, the teacher first."""
    yield "teacher", "", [run for run in content["runs"] if any(row["model"] == "teacher" for row in run["results"])]
    for method, rate in content["chosen"].items():
        for budget in BUDGETS:
            found = [
                run for run in content["runs"]
                if (run["method"], run["budget"], run["learning_rate"]) == (method, budget, rate)
            ]  # fmt: skip
            if found:
                yield method, budget, found


def product_bounds(content: dict[str, Any]) -> list[float]:
    """The best product distribution's total variation, once for every run that tells it."""
    rows = [row for run in content["runs"] for row in run["results"]]
    return [row["value"] for row in rows if row["metric"] == "best_product_total_variation"]


def _steps(content: dict[str, Any], model: str) -> list[int]:
    return sorted({row["num_steps"] for run in content["runs"] for row in run["results"] if row["model"] == model})


def _values(runs: Sequence[dict[str, Any]], metric: str, model: str, steps: int) -> list[float]:
    found = (figure(run, metric, model, steps) for run in runs)
    return [value for value in found if value is not None]


def table(content: dict[str, Any]) -> list[str]:
    """Markdown: means over the seeds, the range where there are several."""
    steps = sorted({*_steps(content, "student"), *_steps(content, "teacher")})
    lines = []
    for metric in (content["metric"], *content["also"]):
        lines += ["", f"{content['task']} ({content['form']}), {metric} by sampling steps:", ""]
        lines.append("| method | equal | learning rate | updates | " + " | ".join(map(str, steps)) + " |")
        lines.append("| --- | --- | ---: | ---: |" + " ---: |" * len(steps))
        for label, budget, runs in rows_of(content):
            model = "teacher" if label == "teacher" else "student"
            cells = [_cell(_values(runs, metric, model, count)) for count in steps]
            own = ["", ""] if model == "teacher" else [f"{runs[0]['learning_rate']:g}", str(runs[0]["steps"])]
            lines.append("| " + " | ".join([label, budget, *own, *cells]) + " |")
    bounds = product_bounds(content)
    if bounds:
        lines += ["", f"No product distribution is nearer than {bounds[0]:.3f}."]
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.3g}"
    return f"{statistics.mean(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def plot(content: dict[str, Any], path: Path) -> None:
    """Main metric against sampling steps, a line for each method; dashed where passes are equal."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(8.5, 4.5), layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots()
    colors = {method: f"C{place}" for place, method in enumerate(METHODS)}
    for label, budget, runs in rows_of(content):
        model = "teacher" if label == "teacher" else "student"
        points = [(n, _values(runs, content["metric"], model, n)) for n in _steps(content, model)]
        points = [(n, values) for n, values in points if values]
        name = label if not budget else f"{label}, equal {budget}"
        style = "--" if budget == "passes" else "-"
        axes.plot(
            [n for n, _ in points], [statistics.mean(values) for _, values in points], style, marker="o",
            color=colors.get(label, "black"), label=name,
        )  # fmt: skip
    bounds = product_bounds(content)
    if bounds:
        axes.axhline(bounds[0], color="gray", linestyle=":", label="best product distribution")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("sampling steps")
    axes.set_ylabel(content["metric"].replace("_", " "))
    axes.set_title(f"{content['task']} ({content['form']})")
    canvas.legend(fontsize=7, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)


def write(path: Path, text: str) -> None:
    """Write a file, with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
