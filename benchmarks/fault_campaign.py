"""Break runs on purpose, over and over, and see that no wrong result is ever accepted silently.

    python benchmarks/fault_campaign.py
    python benchmarks/fault_campaign.py --quick --out quick.json

Two complete little runs (text with a tokenizer and a token cache; pictures with a VQ tokenizer that the run trains) are
done once undisturbed. Then, trial after trial, one is

* killed (SIGKILL) at a random moment, of time or of writing, and the same command given again;
* given a file that was cut short or has a flipped bit: of checkpoints, models, records, caches;
* left without room on its disk (a small tmpfs; where none may be mounted, a limit on the size of files);
* fed with numbers that are not finite: in the data, a network, a plugin's loss, a metric, a sampler's tokens.

Every trial ends as *identical* (it went on, and weights, figures, samples and curves are bit for bit those of the
undisturbed run, no finished stage done twice), *refused* (one message that names the file or place and the remedy; the
remedy is then followed, and must lead to the identical end), *told* (numbers: the step was skipped, and that was
said) or *WRONG*, which makes the campaign fail. Trials that are done are kept; the same command goes on after them.

Every trial is a process of its own, forked from one that has the libraries loaded, which calls what ``dmmd-run`` calls.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_S = 120.0
_ATTEMPTS = 6
COUNTS = {"kill": 50, "damage": 40, "disk": 12, "numbers": 1000}  # numbers: every case once
QUICK = {"kill": 2, "damage": 4, "disk": 1, "numbers": 2}
STAGES = ("data", "teacher", "distill", "evaluate")
REMEDIES = re.compile(
    r"\b(remove|make room|free space|lower|look at|set|give|choose|mend|same command|made again|made anew|begins anew|"
    r"trying the checkpoint before|written anew)\b"
)
PLUGIN = Path(__file__).with_name("faulty_plugin.py")

_TRAIN = {"steps": 9, "batch_size": 8, "log_every": 2, "checkpoint_every": 3, "ema": 0.9}
_COMMON: dict[str, Any] = {
    "schema": 1,
    "process": {"name": "masked"},
    "backbone": {"name": "transformer", "params": {"width": 16, "depth": 1, "heads": 2, "dropout": 0.1}},
    "teacher": {"objective": {"name": "denoising"}, "train": _TRAIN},
    "generator": {"name": "noise_conditioned", "params": {"width": 4}},
    "objective": {"name": "moment_matching"},
    "distill": {"num_steps": 2, **_TRAIN},
    "sampler": {"name": "ancestral"},
    "run": {"directory": "run", "device": "cpu"},
}
_JUDGE: dict[str, Any] = {"teacher_steps": [2], "student_steps": [1, 2], "num_samples": 24}
_LANGUAGE_MODEL = {"name": "causal_transformer", "params": {"width": 8, "depth": 1, "heads": 1, "steps": 4}}
_CLASSIFIER = {"name": "small_classifier", "params": {"steps": 4, "width": 4, "batch_size": 16}}
_TOKENIZER = {
    "codes": 8, "factor": 4, "height": 8, "width": 8, "channels": 1, "base_channels": 4, "code_width": 4, "steps": 6,
    "batch_size": 8, "checkpoint_every": 2,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "text": {
        **_COMMON,
        "name": "text",
        "data": {
            "name": "text",
            "params": {
                "files": ["words.txt"],
                "unit": "line",
                "length": 8,
                "cache": "cache",
                "tokenizer": {"name": "bpe", "params": {"vocab_size": 280}},
            },
        },
        "evaluate": {
            **_JUDGE,
            "metrics": [
                {"name": "gradient_moment", "params": {"reference": _LANGUAGE_MODEL, "batch_size": 8}},
                {"name": "token_entropy"},
            ],
        },
    },
    "pictures": {
        **_COMMON,
        "name": "pictures",
        "data": {
            "name": "vq_tokens",
            "params": {
                "source": {
                    "name": "shapes",
                    "params": {"height": 8, "width": 8, "channels": 1, "num_classes": 3, "train": 48, "test": 24},
                },
                "tokenizer": {"name": "vq_autoencoder", "params": _TOKENIZER},
                "cache": "cache",
                "workers": 1,
            },
        },
        "evaluate": {
            **_JUDGE,
            "metrics": [{"name": "class_histogram", "params": {"features": _CLASSIFIER}}, {"name": "token_entropy"}],
        },
    },
}


@dataclass
class Trial:
    """What was done to a run, and how that ended.

    Attributes:
        kind: ``kill``, ``damage``, ``disk`` or ``numbers``.
        number: Which trial of its kind.
        recipe: Name of the little run.
        what: What was done to it.
        place: The stage or file that it happened to.
        outcome: ``identical``, ``refused``, ``told`` or ``WRONG``.
        detail: The message, or what is wrong.
    """

    kind: str
    number: int
    recipe: str
    what: str = ""
    place: str = ""
    outcome: str = ""
    detail: str = ""


@dataclass
class Ended:
    """How a process ended: exit code (negative: the signal), its standard error, and what it wrote, in order."""

    code: int
    stderr: str
    writes: list[str] = field(default_factory=list)

    @property
    def message(self) -> str:
        """The error as shown to a user."""
        _, found, message = self.stderr.rpartition("dmmd: ")
        return message.strip() if found else ""


@dataclass
class Whole:
    """The undisturbed run of a recipe: its folder, what it is compared by, its writes, and when its stages ended."""

    folder: Path
    marks: dict[str, Any]
    writes: list[str]
    seconds: float
    ends: dict[str, float]


# ---- processes ------------------------------------------------------------------------------------------------------


def in_a_process(
    folder: Path,
    arguments: list[str],
    *,
    before: Callable[[], None] | None = None,
    kill_at_write: int | None = None,
    delay_s: float = 0.0,
) -> Ended:
    """Call ``dmmd-run`` in a forked process whose working directory is `folder`.

    Args:
        folder: Holds the recipe; all paths of the recipe are relative to it.
        arguments: Those of the command line.
        before: Called in the new process first.
        kill_at_write: SIGKILL at the write of that number: opening, renaming, syncing or removing a file of the run.
        delay_s: Time from that write to the signal; at 0 the very write does not happen any more.
    """
    told, tell = os.pipe()
    error_file, writes_file = folder / "stderr.txt", folder / "writes.txt"
    pid = os.fork()
    if pid == 0:
        os.close(told)
        _child(folder, arguments, before, kill_at_write, delay_s, tell, error_file, writes_file)
    os.close(tell)
    started, alive = time.monotonic(), True
    try:
        if kill_at_write is not None and delay_s:
            ready, _, _ = select.select([told], [], [], PATIENCE_S)
            if ready and os.read(told, 1):
                time.sleep(delay_s)
                os.kill(pid, signal.SIGKILL)
        while alive:
            found, status = os.waitpid(pid, os.WNOHANG)
            spent = time.monotonic() - started
            if found:
                alive = False
            elif spent > PATIENCE_S:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                return Ended(1, f"Traceback: the command did not end within {PATIENCE_S:.0f} s")
            else:
                time.sleep(0.002)
    finally:
        os.close(told)
    writes = writes_file.read_text(encoding="utf-8").splitlines() if writes_file.exists() else []
    stderr = error_file.read_text(encoding="utf-8", errors="replace")
    for file in (error_file, writes_file):
        file.unlink(missing_ok=True)
    return Ended(os.waitstatus_to_exitcode(status), stderr, writes)


def _child(
    folder: Path,
    arguments: list[str],
    before: Callable[[], None] | None,
    kill_at_write: int | None,
    delay_s: float,
    tell: int,
    error_file: Path,
    writes_file: Path,
) -> None:
    code = 1
    try:
        errors = os.open(error_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        os.dup2(errors, 2)
        writes = os.open(writes_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.chdir(folder)
        _count_writes(folder, writes, kill_at_write, delay_s, tell)
        if before is not None:
            before()
        from dmmd_core.cli import run_command

        code = run_command(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _count_writes(folder: Path, writes: int, kill_at_write: int | None, delay_s: float, tell: int) -> None:
    """Note everything that changes files below `folder`, and send or ask for the signal at one of them."""
    count = 0
    inside = str(folder) + os.sep

    def noticed(path: Any) -> None:
        nonlocal count
        name = os.path.abspath(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else ""
        if not name.startswith(inside) or name in (f"{inside}stderr.txt", f"{inside}writes.txt"):
            return
        if count == kill_at_write:
            if not delay_s:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(tell, b"x")
        count += 1
        os.write(writes, (name.removeprefix(inside) + "\n").encode())

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                noticed(path)
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            noticed(arguments[0])

    sys.addaudithook(hook)
    sync = os.fsync

    def counted_sync(descriptor: int) -> None:
        noticed(os.readlink(f"/proc/self/fd/{descriptor}") if Path("/proc/self/fd").exists() else "")
        sync(descriptor)

    os.fsync = counted_sync


# ---- what a run is compared by --------------------------------------------------------------------------------------


def marks_of(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must be the same bit for bit, by name."""
    from safetensors.torch import load_file

    from dmmd_core.usage import is_circumstance
    from dmmd_reporting.log import loss_curves

    run = folder / "run"
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    stages = _read(run / "stages.json")
    marks: dict[str, Any] = {"figures": json.dumps(metrics["results"], sort_keys=True)}
    marks["facts"] = json.dumps(metrics["facts"], sort_keys=True)
    versions = _read(run / "plugins.json")
    marks["recipe"] = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))
    marks["versions"] = json.dumps(versions, sort_keys=True)
    for role in ("teacher", "student"):
        marks[f"weights of the {role}"] = _digest(run / role / "model.safetensors")
        marks[f"codec of the {role}"] = _digest(run / role / "codec.safetensors")
    for path in sorted((run / "samples").glob("*/samples.safetensors")):
        tensors = load_file(path)
        marks[f"samples {path.parent.name}"] = {name: tensor.tolist() for name, tensor in tensors.items()}
    marks["stages"] = {name: stage["results"] for name, stage in stages.items()}
    marks["curves"] = {
        stage: {name: curve for name, curve in curves.items() if not is_circumstance(name)}
        for stage, curves in loss_curves(run / "log.jsonl").items()
    }
    for name in ("report.md", "report.html"):
        text = (run / name).read_text(encoding="utf-8")
        marks[name] = all(str(row["metric"]).replace("_", " ") in text for row in metrics["results"]) and bool(text)
    return marks


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def differences(folder: Path, whole: dict[str, Any], leaving_out: tuple[str, ...] = ()) -> list[str]:
    """Names of what is not as in the undisturbed run."""
    from safetensors import SafetensorError

    try:
        found = marks_of(folder)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        return [f"what the run left cannot be read: {error}"]
    names = dict.fromkeys([*whole, *found])
    return [name for name in names if name not in leaving_out and whole.get(name) != found.get(name)]


def finished(folder: Path) -> dict[str, Any]:
    """What a run has finished by now: stages, with the files that hold them, and the sets that are judged."""
    run, found = folder / "run", {}
    for name, stage in _read(run / "stages.json").items():
        found[f"stage {name}"] = json.dumps(stage, sort_keys=True)
        model = run / {"teacher": "teacher", "distill": "student"}.get(name, "none") / "model.safetensors"
        if model.exists():
            found[f"model of {name}"] = (model.stat().st_ino, model.stat().st_mtime_ns)
        if name == "data":
            for path in sorted((folder / "cache").rglob("*")):
                if path.is_file() and path.suffix != ".lock":
                    found[f"cache {path.name}"] = (path.stat().st_ino, path.stat().st_mtime_ns)
    for row in _read(run / "metrics.json").get("results", []):
        path = run / "samples" / f"{row['model']}_{row['num_steps']}" / "samples.safetensors"
        if path.exists():
            found[f"samples {path.parent.name}"] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def _read(path: Path) -> dict[str, Any]:
    """A record without its sums."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.pop("sums", None)
    return content


def complaint(ended: Ended, names: list[str]) -> str:
    """What is wrong with a refusal: a traceback, no message, a message without the file or without a remedy."""
    if "Traceback" in ended.stderr:
        return "a traceback: " + ended.stderr.strip().splitlines()[-1]
    if ended.code != 2 or not ended.message:
        return f"exit code {ended.code} and the message {ended.message!r}"
    if names and not any(name in ended.message for name in names):
        return f"the message names none of {', '.join(names)}: {ended.message}"
    if not REMEDIES.search(ended.message):
        return f"the message gives no remedy: {ended.message}"
    return ""


def judge_end(trial: Trial, ended: Ended, folder: Path, whole: Whole, leaving_out: tuple[str, ...] = ()) -> None:
    """Judge a command that had to go on to the end of the run."""
    if ended.code or "Traceback" in ended.stderr:
        trial.outcome = "WRONG"
        trial.detail = complaint(ended, []) or f"did not go on: {ended.message}"
    elif different := differences(folder, whole.marks, leaving_out):
        trial.outcome, trial.detail = "WRONG", f"silently different: {', '.join(different)}"
    else:
        trial.outcome = "identical"


# ---- the kinds of trials --------------------------------------------------------------------------------------------


class Campaign:
    """All trials, and the folder they happen in.

    Args:
        work: A folder for the runs.
        seed: Seed of all chance.
        names: The little runs to take.
        plant: Whether to plant a fault of the product for every kind of trial, to see that the campaign finds it.
    """

    def __init__(self, work: Path, seed: int, names: list[str], plant: bool = False) -> None:
        self.work, self.seed, self.names, self.planting = work, seed, names, plant
        self.plant: Callable[[], None] | None = None
        self.wholes: dict[str, Whole] = {}
        self.partial: dict[tuple[str, str], Path] = {}

    def prepare(self) -> None:
        """Do every little run undisturbed; with several, twice, so that what is not reproducible shows at once."""
        for name in self.names:
            for copy in ("whole", "twin") if len(self.names) > 1 else ("whole",):
                folder = self.fresh(name, f"{copy}-{name}")
                started = time.time()
                ended = in_a_process(folder, ["recipe.yaml"])
                if ended.code:
                    raise SystemExit(f"the undisturbed run {name} failed:\n{ended.stderr}")
                if copy == "twin":
                    different = differences(folder, self.wholes[name].marks)
                    if different:
                        raise SystemExit(f"two undisturbed runs of {name} differ: {', '.join(different)}")
                    continue
                seconds = time.time() - started
                events = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
                marks = [event for event in events if event["event"] in ("start", "stage")]
                ends = {mark.get("stage", "start"): mark["time"] - started for mark in marks}
                self.wholes[name] = Whole(folder, marks_of(folder), ended.writes, seconds, ends)
                print(f"{name}: {seconds:.1f} s undisturbed, {len(ended.writes)} writes")

    def fresh(self, name: str, place: str) -> Path:
        """A folder with a recipe and nothing else."""
        folder = self.work / place
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _lay_out(folder, RECIPES[name])
        return folder

    def source(self, trial: Trial) -> random.Random:
        """The chance of one trial, whatever was done before it."""
        return random.Random(f"{self.seed}/{trial.kind}/{trial.number}")

    def run(self, kind: str, number: int) -> Trial:
        """Do one trial."""
        name = self.names[number // (2 if kind == "kill" else 1) % len(self.names)]
        trial = Trial(kind, number, name)
        self.plant = PLANTS[kind] if self.planting else None
        try:
            {"kill": self.kill, "damage": self.damage, "disk": self.disk, "numbers": self.numbers}[kind](trial)
        finally:
            for folder in self.work.glob("trial-*"):
                shutil.rmtree(folder, ignore_errors=True)
        return trial

    def kill(self, trial: Trial) -> None:
        """SIGKILL at a random moment, and the same command again."""
        whole, source = self.wholes[trial.recipe], self.source(trial)
        for _ in range(_ATTEMPTS):
            folder = self.fresh(trial.recipe, f"trial-kill-{trial.number}")
            write, delay, trial.what = self._moment(trial.number // 2, bool(trial.number % 2), whole, source)
            ended = in_a_process(folder, ["recipe.yaml"], kill_at_write=write, delay_s=delay)
            if ended.code == -signal.SIGKILL:
                break
        else:
            raise SystemExit(f"kill {trial.number}: the run was always faster than the signal")
        before = finished(folder)
        trial.place = next((stage for stage in STAGES if f"stage {stage}" not in before), "after the last stage")
        again = in_a_process(folder, ["recipe.yaml"], before=self.plant)
        judge_end(trial, again, folder, whole)
        after = finished(folder)
        redone = [name for name, state in before.items() if after.get(name) != state]
        if trial.outcome == "identical" and redone:
            trial.outcome, trial.detail = "WRONG", f"finished and done again: {', '.join(redone)}"

    def _moment(self, number: int, writing: bool, whole: Whole, source: random.Random) -> tuple[int, float, str]:
        """Number of a write, the time from there to the signal, and words for both."""
        if writing:
            groups: dict[str, list[int]] = {}
            for place, path in enumerate(whole.writes):
                groups.setdefault(group_of(path), []).append(place)
            group = sorted(groups)[number % len(groups)]
            delay = source.choice([0.0, source.uniform(0.0001, 0.003)])
            what = f"SIGKILL {'at' if not delay else f'{delay * 1000:.1f} ms after'} a write of {group}"
            return source.choice(groups[group]), delay, what
        stage = (number + 1) % len(STAGES)
        begin = whole.ends[("start", *STAGES)[stage]]
        delay = source.uniform(0, whole.ends[STAGES[stage]] - begin)
        # A stage is recorded by opening, syncing and renaming a file.
        records = [place for place, path in enumerate(whole.writes) if path == "run/.incomplete-stages.json"]
        what = f"SIGKILL {delay:.2f} s after {STAGES[stage]} had begun"
        return records[3 * stage - 1] + 1 if stage else 0, delay, what

    def damage(self, trial: Trial) -> None:
        """A file cut short or with a flipped bit, and the same command."""
        whole, source = self.wholes[trial.recipe], self.source(trial)
        state = ("finished", "distill", "evaluate")[trial.number // len(self.names) % 3]
        folder = self.work / f"trial-damage-{trial.number}"
        shutil.copytree(self.stopped(trial.recipe, state), folder)
        groups: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.stat().st_size and _is_read_again(path.relative_to(folder)):
                groups.setdefault(group_of(str(path.relative_to(folder))), []).append(path)
        places = sorted(groups, reverse=True)
        group = places[(trial.number // len(self.names)) % len(places)]
        path = source.choice(groups[group])
        trial.place = str(path.relative_to(folder))
        trial.what = f"{damage_file(path, source)}, the run {_STATES[state]}"
        ended = in_a_process(folder, ["recipe.yaml"], before=self.plant)
        # A log is no result: what a damaged line held is gone, and nothing else.
        leaving_out = ("curves",) if trial.place.endswith("log.jsonl") else ()
        if not ended.code:
            judge_end(trial, ended, folder, whole, leaving_out)
            return
        trial.detail = complaint(ended, [trial.place])
        if trial.detail:
            trial.outcome = "WRONG"
            return
        message = ended.message
        remove_as_told(message, path)
        judge_end(trial, in_a_process(folder, ["recipe.yaml"], before=self.plant), folder, whole, leaving_out)
        if trial.outcome == "identical":
            trial.outcome, trial.detail = "refused", message
        else:
            trial.detail = f"the remedy does not help: {trial.detail}; after: {message}"

    def stopped(self, name: str, state: str) -> Path:
        """A folder with a run that has finished, or was killed in a stage."""
        if state == "finished":
            return self.wholes[name].folder
        if (name, state) not in self.partial:
            whole = self.wholes[name]
            folder = self.fresh(name, f"{state}-{name}")
            wanted = {"distill": "run/checkpoints/distill/.incomplete-step_000000009", "evaluate": "run/metrics.json"}
            writes = [place for place, path in enumerate(whole.writes) if path.startswith(wanted[state])]
            writes = writes or [place for place, path in enumerate(whole.writes) if "metrics.json" in path]
            end = "run/samples/.incomplete-student_2"
            last = [place for place, path in enumerate(whole.writes) if path.startswith(end)]
            ended = in_a_process(folder, ["recipe.yaml"], kill_at_write=writes[0] if state == "distill" else last[0])
            if ended.code != -signal.SIGKILL:
                raise SystemExit(f"the run {name} could not be stopped in {state}:\n{ended.stderr}")
            self.partial[name, state] = folder
        return self.partial[name, state]

    def disk(self, trial: Trial) -> None:
        """No room left at a random moment; then there is room, and the same command is given again."""
        whole, source = self.wholes[trial.recipe], self.source(trial)
        needed = sum(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
        if can_mount():
            size = int(needed * source.uniform(0.05, 1.0))
            trial.what = f"a disk of {size // 1024} of {needed // 1024} KiB"
            with small_disk(self.work / f"trial-disk-{trial.number}", size) as (folder, grow):
                _lay_out(folder, RECIPES[trial.recipe])
                ended = in_a_process(folder, ["recipe.yaml"], before=self.plant)
                self._after_refusal(trial, ended, folder, whole, grow)
            return
        largest = max(path.stat().st_size for path in whole.folder.rglob("*") if path.is_file())
        size = int(largest * source.uniform(0.05, 0.9))
        trial.what = f"no file may grow beyond {size} bytes"
        folder = self.fresh(trial.recipe, f"trial-disk-{trial.number}")
        ended = in_a_process(
            folder, ["recipe.yaml"], before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        )
        self._after_refusal(trial, ended, folder, whole, lambda: None)

    def _after_refusal(
        self, trial: Trial, ended: Ended, folder: Path, whole: Whole, help_out: Callable[[], None]
    ) -> None:
        if not ended.code:
            judge_end(trial, ended, folder, whole)
            return
        before = finished(folder)
        trial.place = next((stage for stage in STAGES if f"stage {stage}" not in before), "after the last stage")
        trial.detail = complaint(ended, ["run/", "cache/", "cache", str(folder)])
        if trial.detail:
            trial.outcome = "WRONG"
            return
        help_out()
        judge_end(trial, in_a_process(folder, ["recipe.yaml"], before=self.plant), folder, whole)
        after = finished(folder)
        redone = [name for name, state in before.items() if after.get(name) != state]
        if trial.outcome == "identical":
            trial.outcome, trial.detail = "refused", ended.message
            if redone:
                trial.outcome, trial.detail = "WRONG", f"finished and done again: {', '.join(redone)}"

    def numbers(self, trial: Trial) -> None:
        """Numbers that are not finite, or tokens that do not exist."""
        case = CASES[trial.number]
        trial.recipe, trial.what, trial.place = case.recipe, case.what, case.place
        if trial.recipe not in self.names:
            trial.recipe = self.names[0]
        folder = self.fresh(trial.recipe, f"trial-numbers-{trial.number}")
        recipe = json.loads(json.dumps(RECIPES[trial.recipe]))
        case.change(recipe)
        _lay_out(folder, recipe)
        ended = in_a_process(folder, ["recipe.yaml", "--plugin", str(PLUGIN)], before=self.plant)
        problem = _unsound(folder)
        if problem:
            trial.outcome, trial.detail = "WRONG", problem
        elif ended.code:
            trial.detail = complaint(ended, case.names)
            trial.outcome = "WRONG" if trial.detail else "refused"
            trial.detail = trial.detail or ended.message
        elif case.skipped and "the step is skipped" in ended.stderr:
            trial.outcome = "told"
            trial.detail = next(line for line in ended.stderr.splitlines() if "the step is skipped" in line)
        else:
            trial.outcome, trial.detail = "WRONG", "accepted silently"


def _lay_out(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    source = random.Random(0)
    words = ["moment", "matching", "teacher", "student", "noise", "token", "step", "mask"]
    lines = [" ".join(source.choices(words, k=6)) for _ in range(60)]
    (folder / "words.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def group_of(path: str) -> str:
    """What kind of file a path of a run is."""
    parts = Path(path.replace(".incomplete-", "").replace("old-", "")).parts
    if parts[0] != "run":
        return "the caches of the data" if parts[0] == "cache" else "the folder around"
    if len(parts) < 2:
        return "the run directory"
    name = parts[1]
    if name == "checkpoints":
        return f"checkpoints of {parts[2]}" if len(parts) > 2 else "checkpoints"
    if name in ("teacher", "student"):
        return f"the model of the {name}"
    if name in ("plots", "report.md", "report.html"):
        return "reports"
    return {"samples": "samples", "cache": "the caches of metrics"}.get(name, name)


def _is_read_again(path: Path) -> bool:
    """Whether a run ever looks at a file of its directory again."""
    drawn = path.suffix in (".png", ".txt", ".html", ".md", ".lock") or path.name == ".lock"
    return not drawn and path.parts[0] in ("run", "cache")


_STATES = {
    "finished": "was finished",
    "distill": "was killed while it distilled",
    "evaluate": "was killed in evaluation",
}


def damage_file(path: Path, source: random.Random) -> str:
    """Cut a file short or flip one of its bits; returns what was done."""
    content = bytearray(path.read_bytes())
    if source.random() < 0.5:
        left = source.randrange(len(content))
        path.write_bytes(content[:left])
        return f"cut to {left} of {len(content)} bytes"
    place, bit = source.randrange(len(content)), source.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place} flipped"


def remove_as_told(message: str, damaged: Path) -> None:
    """Do what the message says: remove the damaged file, or another one that it names."""
    told = re.search(r"\bremove (\S+?)[,;.]? ", message)
    name = told.group(1) if told else "it"
    folder = next(parent for parent in damaged.parents if parent.name.startswith("trial-"))
    (damaged if name == "it" else folder / name).unlink(missing_ok=True)


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
        if done.returncode:
            return False
        subprocess.run(["umount", folder], check=True)
    return True


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A tmpfs of so many bytes, and a function that makes it large."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)

    def grow() -> None:
        subprocess.run(["mount", "-o", "remount,size=256m", str(folder)], check=True)

    try:
        yield folder, grow
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- numbers that are not finite ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One way to feed a run with numbers that are not finite.

    Attributes:
        what: What is wrong.
        place: Where it comes in.
        recipe: The little run.
        change: Changes its recipe.
        names: Words of which the message must hold one.
        skipped: Whether the run may go on, having told of a skipped step.
    """

    what: str
    place: str
    recipe: str
    change: Callable[[dict[str, Any]], None]
    names: list[str]
    skipped: bool = False


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(recipe: dict[str, Any]) -> None:
        *parents, last = key.split(".")
        for name in parents:
            recipe = recipe.setdefault(name, {})
        recipe[last] = value

    return change


def _all(*changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def change(recipe: dict[str, Any]) -> None:
        for one in changes:
            one(recipe)

    return change


def _objective(first: int, count: int, what: str = "loss", value: str = "nan") -> Callable[[dict[str, Any]], None]:
    params = {"first": first, "count": count, "what": what, "value": value}
    slot = {"name": "faulty_moment_matching", "params": params}
    return _all(_set("objective", slot), _set("distill.steps", 30))


def _backbone(first: int, count: int) -> Callable[[dict[str, Any]], None]:
    params = {"width": 16, "depth": 1, "heads": 2, "first": first, "count": count}
    return _all(_set("backbone", {"name": "faulty_transformer", "params": params}), _set("teacher.train.steps", 30))


def _sampler(what: str) -> Callable[[dict[str, Any]], None]:
    return _set("sampler", {"name": "faulty_ancestral", "params": {"what": what}})


def _metric(what: str) -> Callable[[dict[str, Any]], None]:
    return _set("evaluate.metrics", [{"name": "faulty_metric", "params": {"what": what}}])


def _data(what: str) -> Callable[[dict[str, Any]], None]:
    return _set("data", {"name": "faulty_letters", "params": {"what": what}})


CASES = [
    Case("a loss is NaN at one step", "a plugin's loss", "text", _objective(4, 1), ["distill"], skipped=True),
    Case("a metric gives NaN", "a metric", "text", _metric("nan"), ["faulty_metric"]),
    Case("a sampler gives tokens beyond the vocabulary", "a sampler", "text", _sampler("beyond"), ["faulty_ancestral"]),
    Case("a loss is NaN from a step on", "a plugin's loss", "text", _objective(4, 999), ["distill"]),
    Case("a loss is infinite from a step on", "a plugin's loss", "text", _objective(4, 999, value="inf"), ["distill"]),
    Case("a gradient is NaN at one step", "a plugin's loss", "text", _objective(4, 1, "gradient"), ["distill"], True),
    Case("a logged figure is NaN", "a plugin's loss", "text", _objective(3, 99, "metric"), ["distill"]),
    Case("weights become NaN", "a network", "text", _objective(4, 1, "weights"), ["student"]),
    Case("a network gives NaN at one call", "a network", "text", _backbone(5, 1), ["teacher"], skipped=True),
    Case("a network gives NaN from a call on", "a network", "text", _backbone(5, 9999), ["teacher"]),
    Case("a frozen network gives NaN", "a network", "text", _backbone(-1, 9999), ["distill"]),
    Case("a network gives NaN in evaluation", "a network", "text", _sampler("logits"), ["teacher", "student"]),
    Case("a metric gives infinity", "a metric", "text", _metric("inf"), ["faulty_metric"]),
    Case("a metric gives a standard error of NaN", "a metric", "text", _metric("error"), ["faulty_metric"]),
    Case("a metric's fact is NaN", "a metric", "text", _metric("fact"), ["faulty_metric"]),
    Case("a sampler gives tokens below zero", "a sampler", "text", _sampler("below"), ["faulty_ancestral"]),
    Case("a sampler gives NaN as tokens", "a sampler", "text", _sampler("nan"), ["faulty_ancestral"]),
    Case("a sampler gives too few tokens", "a sampler", "text", _sampler("short"), ["faulty_ancestral"]),
    Case("the data give NaN as tokens", "the data", "text", _data("nan"), ["faulty_letters"]),
    Case("the data give tokens beyond the vocabulary", "the data", "text", _data("beyond"), ["faulty_letters"]),
    Case("the held-out data give NaN as tokens", "the data", "text", _data("held_out"), ["faulty_letters"]),
]
COUNTS["numbers"] = len(CASES)


def _unsound(folder: Path) -> str:
    """Says what of a run is not finite, whatever the command has said about it."""
    from safetensors.torch import load_file

    run = folder / "run"
    for path in sorted(run.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            if not tensor.double().isfinite().all():
                return f"{path.relative_to(folder)} holds {name}, which is not finite"
            if name == "tokens" and (tensor.is_floating_point() or tensor.min() < 0):
                return f"{path.relative_to(folder)} holds tokens that do not exist"
    for row in _read(run / "metrics.json").get("results", []):
        for value in (row["value"], row["standard_error"]):
            if value is not None and not math.isfinite(value):
                return f"metrics.json holds {row['metric']} = {value}"
    bad = [name for name, value in _read(run / "metrics.json").get("facts", {}).items() if not math.isfinite(value)]
    return f"metrics.json holds the facts {', '.join(bad)}, which are not finite" if bad else ""


# ---- faults planted, to see that they are found ---------------------------------------------------------------------


def _misread() -> None:
    """A figure that is read back is another one."""
    pipeline = importlib.import_module("dmmd_core.pipeline")
    read = pipeline.read_record

    def misread(path: Path) -> Any:
        content = read(path)
        for row in (content or {}).get("results", ()):
            row["value"] += 1
        return content

    pipeline.read_record = misread  # type: ignore[attr-defined]


def _begin_anew() -> None:
    """No checkpoint and no finished stage is ever found again."""
    pipeline = importlib.import_module("dmmd_core.pipeline")
    opened = pipeline.Run._open_directory

    def forgetful(self: Any, lock: Any) -> Any:
        _, metrics = opened(self, lock)
        return {}, metrics

    pipeline.Run._open_directory = forgetful  # type: ignore[attr-defined]


def _say_nothing() -> None:
    """Messages have no remedy."""
    errors = importlib.import_module("dmmd_core.errors")
    errors.DmmdError.__str__ = lambda self: "something went wrong"  # type: ignore[attr-defined]


PLANTS: dict[str, Callable[[], None]] = {
    "kill": _begin_anew,
    "damage": _misread,
    "disk": _say_nothing,
    "numbers": _say_nothing,
}


# ---- the command ----------------------------------------------------------------------------------------------------


def table(trials: list[Trial]) -> str:
    """Markdown: what was tried, how often, and how it ended."""
    titles = {
        "kill": "SIGKILL, then the same command",
        "damage": "a file cut short or with a flipped bit",
        "disk": "no room on the disk, then room",
        "numbers": "NaN, infinity, tokens that do not exist",
    }
    ends = ("identical", "refused", "told", "WRONG")
    lines = [
        "| what was tried | trials | went on, identical | refused, with file and remedy | skipped and told | WRONG |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind, title in titles.items():
        found = Counter(trial.outcome for trial in trials if trial.kind == kind)
        if found:
            lines.append(f"| {title} | {found.total()} | " + " | ".join(str(found[end]) for end in ends) + " |")
    return "\n".join(lines)


def places(trials: list[Trial]) -> str:
    """Markdown: where trials of each kind happened, with their number."""
    lines = ["| where | trials |", "| --- | --- |"]
    for kind in COUNTS:
        where = Counter(
            group_of(trial.place) if kind == "damage" else trial.place for trial in trials if trial.kind == kind
        )
        if where:
            lines.append(f"| {kind} | {', '.join(f'{name} {count}' for name, count in sorted(where.items()))} |")
    return "\n".join(lines)


def load_libraries() -> None:
    """Load what runs need, once, so that a fork has it; nothing is computed here."""
    names = ("dmmd_core.api", "matplotlib.pyplot", "jinja2", "tokenizers", "PIL.Image", "rich.progress", "tqdm.auto")
    for name in (*names, "safetensors.torch", "dmmd_reporting.log"):
        importlib.import_module(name)
    from dmmd_core import load_plugins

    load_plugins()


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, do what is missing, write the result; 1 where anything is WRONG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all chance (default: 0)")
    parser.add_argument("--quick", action="store_true", help="a handful of trials of one run, half a minute")
    for kind, count in COUNTS.items():
        default = "every case once" if kind == "numbers" else str(count)
        parser.add_argument(f"--{kind}", type=int, help=f"number of trials (default: {default})")
    parser.add_argument("--plant", action="store_true", help="break the product itself, to see that it is noticed")
    parser.add_argument("--work", type=Path, help="folder for the runs (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="result (default: benchmarks/results/fault_campaign.json)")
    options = parser.parse_args(arguments)
    defaults = QUICK if options.quick else COUNTS
    counts = {kind: defaults[kind] if getattr(options, kind) is None else getattr(options, kind) for kind in COUNTS}
    counts["numbers"] = min(counts["numbers"], len(CASES))
    out = options.out or ROOT / "benchmarks" / "results" / "fault_campaign.json"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    load_libraries()
    content = _begun(out, options.seed)
    done = {(trial["kind"], trial["number"]) for trial in content["trials"]}
    with tempfile.TemporaryDirectory(prefix="fault-campaign-") as temporary:
        names = ["text"] if options.quick else list(RECIPES)
        campaign = Campaign((options.work or Path(temporary)).resolve(), options.seed, names, options.plant)
        campaign.prepare()
        for kind, count in counts.items():
            for number in range(count):
                if (kind, number) in done:
                    continue
                trial = campaign.run(kind, number)
                print(f"{kind} {number}: {trial.what} ({trial.place}): {trial.outcome}  {trial.detail}", flush=True)
                content["trials"].append(asdict(trial))
                _write(out, content)
    trials = [Trial(**trial) for trial in content["trials"]]
    print(f"\n{table(trials)}\n\n{places(trials)}")
    if not can_mount():
        print("\nno tmpfs may be mounted here: the disk was not filled, files were limited in size instead")
    wrong = [trial for trial in trials if trial.outcome == "WRONG"]
    for trial in wrong:
        print(f"WRONG: {trial.kind} {trial.number} ({trial.recipe}): {trial.what}: {trial.detail}")
    return 1 if wrong else 0


def _begun(out: Path, seed: int) -> dict[str, Any]:
    """What an earlier command left of the same campaign of the same code, or an empty one."""
    content: dict[str, Any] = {
        "command": "python benchmarks/fault_campaign.py" + (f" --seed {seed}" if seed else ""),
        "commit": _commit(),
        "seed": seed,
        "disk": "tmpfs" if can_mount() else "RLIMIT_FSIZE",
        "machine": {
            "cpu_count": os.cpu_count(),
            "platform": platform.machine(),
            "python": platform.python_version(),
        },
        "trials": [],
    }
    if out.exists():
        before: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        if all(before.get(key) == content[key] for key in ("commit", "seed", "disk")):
            return before
    return content


def _write(out: Path, content: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, out)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MPLBACKEND", "Agg")
    raise SystemExit(main())
