"""Clauses for observers."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from dmmd_core.interfaces import Observer, Value
from dmmd_core.testing.report import clause, expect
from dmmd_core.testing.subject import GENERAL, Case

_PICTURES = "pictures"


class ObserverCase(Case):
    """An observer of a made-up run, each one built with a run directory of its own."""

    def prepare(self) -> None:
        """Make the run directory and what a run would offer."""
        self.folder = Path(tempfile.mkdtemp(prefix="dmmd-conformance-"))
        self.directory = self.folder / "run"
        self.clear()
        self.offers = {"directory": self.directory, "name": "kit", "recipe": {"schema": 1, "name": "kit"}}

    def close(self) -> None:
        """Remove the directory."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        """Make the run directory empty."""
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()

    def files(self) -> list[str]:
        """Names of what is in the run directory."""
        return sorted(path.name for path in self.directory.iterdir())


def live(observer: Observer, samples: str = _PICTURES, *, error: BaseException | None = None) -> dict[str, Any]:
    """Let an observer see a whole run; returns what it was handed, for comparison with `handed`.

    An observer that fails is ended with its own error, as a run would: what it has opened must not outlive the case.
    """
    told = handed(samples)
    try:
        _tell(observer, told)
    except BaseException as failure:
        with suppress(Exception):
            observer.end(failure)
        raise
    observer.end(error)
    return told


def _tell(observer: Observer, told: dict[str, Any]) -> None:
    """All that a run has to tell between beginning and end."""
    observer.begin()
    observer.on_stage("data", 0.25)
    for step, metrics in told["steps"].items():
        observer.on_step("distill", step, metrics)
    observer.on_warning("distill", 4, "the student seems to *collapse* <b>")
    observer.on_checkpoint("distill", 4, Path("checkpoints") / "distill" / "step_000000004")
    observer.on_stage("distill", 1.5)
    for model, num_steps in (("train", 0), ("test", 0), ("teacher", 1), ("teacher", 4), ("student", 2)):
        observer.on_samples(model, num_steps, told["samples"])
        observer.on_figures(model, num_steps, told["figures"])
    observer.on_stage("evaluate", 0.5)


def handed(samples: str) -> dict[str, Any]:
    """What `live` hands over."""
    pictures = (torch.arange(3 * 1 * 4 * 4) % 256).to(torch.uint8).reshape(3, 1, 4, 4)
    return {
        "steps": {
            step: {"student_loss": 1 / step, "learning_rate": 1e-3, "samples_per_second": 9.5, "loss_time_share": 0.5}
            for step in (2, 4)
        },
        "figures": [
            Value("entropy", 0.5, 0.1, "a", 10, None),
            Value("entropy", math.nan, None, "b", 10, None),
            Value("divergence", math.inf, num_samples=10),
        ],
        "samples": pictures if samples == _PICTURES else ["first\nsecond line", "", "# *no* heading\r\n<script>"],
    }


@contextmanager
def _elsewhere(folder: Path) -> Iterator[None]:
    """Work in another directory."""
    before = Path.cwd()
    folder.mkdir(exist_ok=True)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@clause("constructor", remedy="open files and connections in begin")
def constructor(case: ObserverCase) -> None:
    """The constructor writes nothing: a recipe that is checked leaves no trace."""
    case.clear()
    case.fresh()
    expect(not case.files(), f"the run directory holds {', '.join(case.files())} before begin")


@clause("life", remedy="take whatever a run may tell: figures that are not finite, pictures of one channel, odd texts")
def life(case: ObserverCase) -> None:
    """It sees a whole run, with pictures or with texts, and changes nothing that it is handed."""
    for samples in (_PICTURES, "texts"):
        case.clear()
        got, wanted = live(case.fresh(), samples), handed(samples)
        same = torch.equal(got["samples"], wanted["samples"]) if samples == _PICTURES else got == wanted
        expect(same, f"the {samples} that were handed over have been changed")
        for name in ("steps", "figures"):
            expect(repr(got[name]) == repr(wanted[name]), f"the {name} that were handed over have been changed")


@clause("place", remedy="write into the directory that the constructor is offered")
def place(case: ObserverCase) -> None:
    """It writes into the run directory alone, wherever the command was given."""
    case.clear()
    cwd = case.folder / "cwd"
    with _elsewhere(cwd):
        live(case.fresh())
    left = sorted(path.name for path in cwd.iterdir())
    expect(not left, f"it left {', '.join(left)} in the working directory")


@clause("end", remedy="let end close what is open, whatever that is; it may be called where nothing was begun")
def ends(case: ObserverCase) -> None:
    """It can be ended before it has begun, right after, and by an error."""
    case.clear()
    case.fresh().end(RuntimeError("the run could not begin"))
    observer: Observer = case.fresh()
    observer.begin()
    observer.end(None)
    live(case.fresh(), error=KeyboardInterrupt())


@clause("resume", remedy="go on in a directory with files of an earlier life")
def resume(case: ObserverCase) -> None:
    """It goes on in a directory in which it has lived before, and may be told the same again."""
    case.clear()
    live(case.fresh(), error=RuntimeError("pre-empted"))
    live(case.fresh())


CLAUSES = (*GENERAL, constructor, life, place, ends, resume)
