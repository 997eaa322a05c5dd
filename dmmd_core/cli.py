"""The command lines ``dmmd-run`` and ``dmmd-sample``; heavy imports wait until they are needed."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from dmmd_core.errors import DmmdError, RecipeError, RunError, ToldElsewhereError

if TYPE_CHECKING:
    from torch import Tensor

    from dmmd_core.pipeline import Run
    from dmmd_core.registry import Registry

EXIT_CODES = "exit codes: 0 done; 1 internal error; 2 bad recipe, plugin, data or checkpoint; 130 interrupted"


def run_command(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``dmmd-run``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dmmd-run",
        description="Train or load a teacher, distil it into a few-step student, sample, evaluate and report.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("recipe", nargs="?", help="path of a recipe (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe keys to set, e.g. run.seed=1")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="validate, build on the meta device, print sizes, stop")
    mode.add_argument("--dry-run", action="store_true", help="list the stages and what is done already, stop")
    mode.add_argument("--smoke", action="store_true", help="the same pipeline shrunk to minutes; result thrown away")
    mode.add_argument("--plugins", action="store_true", help="list all components and who provides them")
    mode.add_argument("--explain", metavar="NAME", help="tell all about one component, NAME or KIND:NAME")
    mode.add_argument(
        "--conformance", metavar="KIND:NAME", help="hold a component against the contract; its params as key=value"
    )
    mode.add_argument("--copy-recipes", metavar="DIR", help="copy the recipes that come with dmmd into a folder")
    parser.add_argument(
        "--profile", action="store_true", help="trace a few steps of every stage and a sampling call into profile/"
    )
    _add_common(parser)
    options = parser.parse_intermixed_args(arguments)
    _set_up(options)
    alone = options.plugins or options.explain or options.conformance or options.copy_recipes
    if not alone and options.recipe is None:
        parser.error("give a recipe, or one of --plugins, --explain, --conformance, --copy-recipes")
    if (options.plugins or options.explain or options.copy_recipes) and options.recipe is not None:
        parser.error(f"this mode takes no recipe, got {options.recipe!r}")
    if options.profile:
        if alone or options.check or options.dry_run:
            parser.error("--profile goes with a run or --smoke; this mode runs nothing")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library tells of its own life
    return _guard(lambda: _answer(options, _run))


def sample_command(arguments: Sequence[str] | None = None) -> int:
    """Entry of ``dmmd-sample``; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="dmmd-sample", description="Draw samples from a trained student or teacher.", epilog=EXIT_CODES
    )
    parser.add_argument("path", help="a run directory, its student or teacher folder, or owner/name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--steps", type=int, help="sampling steps; with blocks, for each (default: as trained for)")
    parser.add_argument("--num", type=int, default=16, help="number of samples (default: 16)")
    parser.add_argument("--model", choices=("student", "teacher"), default="student", help="which model")
    parser.add_argument("--label", type=int, help="class label, for models with classes")
    parser.add_argument("--prompt", default="", help="text that every sample begins with")
    parser.add_argument("--suffix", default="", help="text that every sample ends with")
    parser.add_argument(
        "--template", metavar="FILE", help="tokens to keep: .npy of [length] or [num, length], -1 where to fill in"
    )
    parser.add_argument("--length", type=int, help="tokens per sample, for models with blocks (default: as trained)")
    parser.add_argument("--guidance", type=float, help="guidance of a teacher by labels; 1 is none (default: recipe)")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of every prediction (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus of every prediction (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", default="samples", help="folder to write to (default: samples)")
    _add_common(parser)
    options = parser.parse_args(arguments)
    _set_up(options)
    return _guard(lambda: _answer(options, _sample))


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin", metavar="FILE", action="append", default=[], help="a Python file with hooks, used as a plugin"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors and what was asked for, no progress")
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output; implies --quiet")


def _set_up(options: argparse.Namespace) -> None:
    _let_threads_sleep()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Advice to developers, from every process: parameters without gradient and views are dealt with.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    options.quiet = options.quiet or options.json
    if options.quiet:
        os.environ["DMMD_QUIET"] = "1"  # heard by `dmmd_core.progress`


def _answer(options: argparse.Namespace, work: Callable[[argparse.Namespace], Any]) -> None:
    """Do the work; with ``--json`` print what it returns, or its error, as one document."""
    try:
        told = work(options)
    except DmmdError as error:
        if options.json:
            told = {"error": str(error), "exit_code": error.exit_code}
            if isinstance(error, RecipeError):
                told["problems"] = [vars(problem) for problem in error.problems]
            print(json.dumps(told, indent=2))
        raise
    if options.json:
        print(json.dumps(told, indent=2))


def _let_threads_sleep() -> None:
    """Make OpenMP threads sleep soon while they wait, unless the user has chosen; effective before torch is imported.

    Threads that spin for long and must share a core with anything else slow small networks down twentyfold; threads
    that never spin take twice the time on an idle machine, for a small network's operations follow each other closely.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _guard(work: Callable[[], None]) -> int:
    """Run `work`; show known errors as one message without a traceback."""
    try:
        work()
    except ToldElsewhereError as error:
        return error.exit_code
    except DmmdError as error:
        print(f"dmmd: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("dmmd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what = error.filename or "a file"
        print(
            f"dmmd: {what} cannot be written ({error.strerror}); finished work is safe: make room, and run the same "
            "command to go on",
            file=sys.stderr,
        )
        return 2
    return 0


def _run(options: argparse.Namespace) -> Any:
    """Do what the options ask for; returns what ``--json`` prints."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    other_modes = ("copy_recipes", "plugins", "explain", "conformance", "check", "dry_run")
    if size > 1 and any(getattr(options, name) for name in other_modes):
        if rank == 0:
            raise RunError("only runs and --smoke work with several processes; give this command without torchrun")
        raise ToldElsewhereError("see the first process", RunError.exit_code)
    if options.copy_recipes:
        return _copy_recipes(options)

    from dmmd_core.plugins import load_plugins

    registry = load_plugins(files=options.plugin)
    if options.plugins or options.explain:
        return _list(options, registry)
    if options.conformance:
        return _conformance(options, registry)

    if options.dry_run:
        return _dry_run(options, registry)

    from dmmd_core.api import prepare

    # Neither --check nor --smoke needs the data, paths or libraries of the full run to be there.
    run = prepare(
        options.recipe,
        options.overrides,
        registry=registry,
        smoke=options.smoke,
        quiet=options.quiet,
        profile=options.profile,
        outside=not options.check,
    )
    if options.check:
        return _check(options, run, registry)
    _stop_on_signals(run)
    run.execute()
    options.json = options.json and rank == 0
    return {"directory": str(run.directory), "stages": run.stages, "metrics": run.metrics}


def _copy_recipes(options: argparse.Namespace) -> Any:
    from pathlib import Path

    from dmmd_core.shipped import copy_recipes

    paths = [str(path) for path in copy_recipes(Path(options.copy_recipes))]
    if not options.quiet:
        print("\n".join(paths))
    return {"files": paths}


def _list(options: argparse.Namespace, registry: Registry) -> Any:
    from dmmd_core import listing

    if options.plugins:
        if not options.json:
            listing.print_plugins(registry)
        return listing.plugins_as_data(registry)
    entries = listing.find_entries(registry, options.explain)
    if not options.json:
        for entry in entries:
            listing.print_explanation(entry)
    return [listing.explain_as_data(entry) for entry in entries]


def _dry_run(options: argparse.Namespace, registry: Registry) -> Any:
    from dataclasses import asdict
    from pathlib import Path

    from dmmd_core.agenda import agenda
    from dmmd_core.listing import print_agenda
    from dmmd_core.recipe import load_recipe
    from dmmd_core.resolve import resolve

    plan = resolve(load_recipe(options.recipe, options.overrides), registry, outside=False)
    items, directory = agenda(plan), Path(plan.recipe.run.directory)
    if not options.json:
        print_agenda(items, directory)
    return {"directory": str(directory), "stages": [asdict(item) for item in items]}


def _check(options: argparse.Namespace, run: Run, registry: Registry) -> Any:
    from dmmd_core.listing import check_as_data, print_check
    from dmmd_core.resolve import resolve

    told = check_as_data(run)
    if not options.json:
        print_check(run)
    try:
        resolve(run.plan.recipe, registry)
    except RecipeError as error:
        told["missing"] = [vars(problem) for problem in error.problems]
        if not options.json:
            print(f"\nWhat the run needs and does not find here:\n{error}")
    return told


def _conformance(options: argparse.Namespace, registry: Registry) -> Any:
    """Print how a component keeps the contract of its kind; raises a `ConformanceError` where it does not."""
    import torch

    from dmmd_core.errors import PluginError
    from dmmd_core.recipe import read_settings
    from dmmd_core.testing import ConformanceError, judge

    kind, colon, name = options.conformance.partition(":")
    if not colon or not name:
        raise PluginError(f"--conformance takes KIND:NAME, such as process:my_process, got {options.conformance!r}")
    settings = [text for text in (options.recipe, *options.overrides) if text is not None]
    torch.set_num_threads(1)  # the kit's sizes are tiny
    report = judge(name, read_settings(settings) if settings else None, kind=kind, registry=registry)
    if not options.quiet:
        print(report)
    if not report.holds:
        raise ConformanceError(report)
    return report.plain()


def _stop_on_signals(run: Run) -> None:
    """Let the first SIGINT or SIGTERM end the run at the next step, the second one at once."""

    def request_stop(number: int, frame: Any) -> None:
        run.stop_requested = True
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)


def _sample(options: argparse.Namespace) -> Any:
    from pathlib import Path

    from dmmd_core.errors import RunError
    from dmmd_core.media import write_media
    from dmmd_core.plugins import load_plugins
    from dmmd_core.precision import choose_device
    from dmmd_core.saved import load_student, load_teacher

    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise RunError(f"--out: {out} is a file; give a folder")
    load = load_student if options.model == "student" else load_teacher
    registry = load_plugins(files=options.plugin)
    model = load(options.path, device=choose_device(options.device), registry=registry, revision=options.revision)
    try:
        tokens = model.sample(
            options.num,
            steps=options.steps,
            seed=options.seed,
            label=options.label,
            prompt=options.prompt,
            suffix=options.suffix,
            template=_template(options),
            length=options.length,
            guidance=options.guidance,
            temperature=options.temperature,
            top_p=options.top_p,
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    steps = options.steps or model.trained_num_steps
    written = write_media(model.codec, tokens, out, f"{options.model}_{steps}_seed{options.seed}")
    files = [str(path) for path in written]
    if not options.quiet:
        print("\n".join(files))
    return {"files": files, "model": options.model, "steps": steps, "num": options.num, "seed": options.seed}


def _template(options: argparse.Namespace) -> Tensor | None:
    """The tokens to keep, from a file; raises a `ValueError` where it is none."""
    if not options.template:
        return None
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(options.template, allow_pickle=False))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"--template: {options.template} cannot be read as .npy ({error})") from error
