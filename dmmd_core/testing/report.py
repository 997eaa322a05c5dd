"""Clauses of the conformance kit: how one is stated, checked and reported."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dmmd_core.errors import DmmdError
from dmmd_core.testing.surroundings import Surroundings

Verdict = Literal["ok", "failed", "skipped", "not reached"]
GLOBAL_STATE = "global_state"
_HERE = Path(__file__).parent


class Breach(Exception):  # noqa: N818 - a finding, not a failure of the kit
    """A component breaks a clause; the message says what was got and what was expected."""


class Skip(Exception):  # noqa: N818 - as above
    """A clause does not apply to this component, or cannot be checked here; the message says why."""


class ConformanceError(AssertionError, DmmdError):
    """A component breaks clauses of its kit; the message is the report of what failed.

    Attributes:
        report: The whole report.
    """

    exit_code = 2

    def __init__(self, report: Report) -> None:
        self.report = report
        broken = ", ".join(outcome.clause for outcome in report.failures)
        count = f"{len(report.failures)} of {len(report.outcomes)} clauses"
        super().__init__(f"{report.subject} breaks {count}: {broken}\n{report.text(only_failures=True)}")


def expect(holds: object, message: str) -> None:
    """Raise a `Breach` unless `holds`."""
    if not holds:
        raise Breach(message)


def expect_close(got: Tensor, wanted: Tensor, what: str, *, tolerance: float) -> None:
    """Raise a `Breach` where two tensors differ by more than `tolerance` in any element, or in shape.

    Infinities of one sign are equal; the message shows the place and both numbers.
    """
    expect(got.shape == wanted.shape, f"{what} has shape {list(got.shape)}, expected {list(wanted.shape)}")
    if not got.numel():
        return
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    gap = torch.where(got == wanted, 0.0, (got - wanted).abs()).nan_to_num(nan=math.inf)
    worst = int(gap.argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(worst), gap.shape)]
    expect(
        float(gap.flatten()[worst]) <= tolerance,
        f"{what} is {float(got.flatten()[worst]):.6g} at {place}, expected {float(wanted.flatten()[worst]):.6g}",
    )


def expect_frequencies(tokens: Tensor, probs: Tensor, what: str) -> None:
    """Raise a `Breach` where token counts are more than six standard deviations of a binomial from `probs`.

    Args:
        tokens: Independent draws, int64, any shape.
        probs: Their distribution, float64 ``[categories]``.
        what: Name in the message.
    """
    counts = tokens.flatten().cpu().bincount(minlength=len(probs)).double()
    expect(len(counts) == len(probs), f"{what}: token {len(counts) - 1} was drawn, there are 0..{len(probs) - 1}")
    total = counts.sum()
    bound = 6 * (total * probs * (1 - probs)).clamp_min(0).sqrt() + 1e-6 * total
    off = ((counts - total * probs).abs() - bound).argmax()
    expect(
        bool(((counts - total * probs).abs() <= bound).all()),
        f"{what}: token {int(off)} was drawn with frequency {float(counts[off] / total):.4f} in {int(total)} draws, "
        f"expected {float(probs[off]):.4f} (six standard deviations are {float(bound[off] / total):.4f})",
    )


@dataclass(frozen=True)
class Clause:
    """One thing that a component of a kind must do.

    Attributes:
        name: Short name, for `only` and `skip`.
        title: What must hold, one sentence.
        remedy: What to do where it does not.
        check: Called with the case; raises `Breach` or `Skip`.
    """

    name: str
    title: str
    remedy: str
    check: Callable[[Any], None]


def clause(name: str, *, remedy: str) -> Callable[[Callable[[Any], None]], Clause]:
    """Make a `Clause` of a function, whose docstring's first line becomes the title."""

    def make(check: Callable[[Any], None]) -> Clause:
        title = (check.__doc__ or "").strip().split("\n")[0].rstrip(".")
        return Clause(name, title, remedy, check)

    return make


@dataclass(frozen=True)
class Outcome:
    """How one clause came out.

    Attributes:
        clause: Its name.
        title: What must hold.
        verdict: ``ok``, ``failed``, ``skipped`` or ``not reached``.
        message: What was found, or why it was not checked; empty where all is well.
        remedy: What to do; empty where all is well.
    """

    clause: str
    title: str
    verdict: Verdict
    message: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What the kit found out about one component.

    Attributes:
        subject: Kind, name and provider of the component.
        outcomes: One per clause, in the order of checking.
    """

    subject: str
    outcomes: tuple[Outcome, ...]

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The clauses that are broken."""
        return tuple(outcome for outcome in self.outcomes if outcome.verdict == "failed")

    @property
    def holds(self) -> bool:
        """Whether no clause is broken."""
        return not self.failures

    def text(self, *, only_failures: bool = False) -> str:
        """Return the report for people: one line a clause, and below a broken one what was found and what to do."""
        width = max(len(outcome.clause) for outcome in self.outcomes)
        lines = [self.subject]
        told = self.failures if only_failures else [one for one in self.outcomes if one.verdict != "not reached"]
        for outcome in told:
            mark = "FAILED" if outcome.verdict == "failed" else outcome.verdict
            lines.append(f"  {mark:<11}  {outcome.clause:<{width}}  {outcome.title}")
            if outcome.message:
                lines.append(f"{'':15}{outcome.message}")
            if outcome.remedy:
                lines.append(f"{'':15}what to do: {outcome.remedy}")
        counts = dict.fromkeys(("ok", "failed", "skipped", "not reached"), 0)
        for outcome in self.outcomes:
            counts[outcome.verdict] += 1
        summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
        return "\n".join([*lines, f"  {len(self.outcomes)} clauses: {summary}"])

    def __str__(self) -> str:
        """Return `text`."""
        return self.text()

    def plain(self) -> dict[str, Any]:
        """Return the report as plain containers, ready for JSON."""
        return {"subject": self.subject, "holds": self.holds, "clauses": [asdict(one) for one in self.outcomes]}


def run_clauses(
    subject: str,
    build: Callable[[], object],
    clauses: Sequence[Clause],
    *,
    only: Collection[str] = (),
    skip: Collection[str] = (),
) -> Report:
    """Check clauses one after the other; what is broken does not hide the next.

    Args:
        subject: Names the component in the report.
        build: Makes the case that the clauses are called with.
        clauses: The clauses.
        only: Names of the clauses to report; all by default.
        skip: Names of clauses that are left out on purpose.

    Raises:
        ValueError: `only` or `skip` names a clause that does not exist.
    """
    names = ["builds", *(one.name for one in clauses), GLOBAL_STATE]
    unknown = sorted({*only, *skip} - set(names))
    if unknown:
        raise ValueError(f"there is no clause {', '.join(unknown)}; the clauses are {', '.join(names)}")
    # Every clause must have run before anything can be said of the global state.
    running = [one for one in clauses if not only or one.name in only or GLOBAL_STATE in only]
    changes: list[str] = []
    made: list[object] = []

    @clause("builds", remedy="give params that are valid, or mend class and constructor as docs/write_a_plugin.md says")
    def construction(_: object) -> None:
        """The component passes the door and is built from its Config, at the kit's sizes."""
        made.append(build())

    outcomes = [_outcome(construction, None, changes)]
    for one in running:
        if one.name in skip:
            outcomes.append(Outcome(one.name, one.title, "skipped", "left out on purpose"))
        elif not made:
            outcomes.append(Outcome(one.name, one.title, "not reached", "the component could not be built"))
        else:
            outcomes.append(_outcome(one, made[0], changes))
    outcomes.append(_global_state(changes, skipped=GLOBAL_STATE in skip))
    if only:
        outcomes = [one for one in outcomes if one.clause in only or (one.clause == "builds" and not made)]
    return Report(subject, tuple(outcomes))


def _outcome(one: Clause, case: object, changes: list[str]) -> Outcome:
    before = Surroundings.now()
    try:
        one.check(case)
    except Skip as reason:
        return Outcome(one.name, one.title, "skipped", str(reason))
    except Breach as breach:
        return Outcome(one.name, one.title, "failed", str(breach), one.remedy)
    except (Exception, SystemExit) as error:  # a stranger's code may raise whatever it likes
        message = " ".join(f"raised {type(error).__name__}: {error}".split())
        return Outcome(one.name, one.title, "failed", f"{message}{_place(error)}", one.remedy)
    finally:
        changes += [f"{change} (while checking {one.name})" for change in before.changes()]
        before.restore()
    return Outcome(one.name, one.title, "ok")


def _place(error: BaseException) -> str:
    """Where an error was raised: the last line of code that is not the kit's own."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent != _HERE]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _global_state(changes: Sequence[str], *, skipped: bool) -> Outcome:
    title = "Nothing global is changed: random states, default dtype, threads, gradient mode, flags"
    if skipped:
        return Outcome(GLOBAL_STATE, title, "skipped", "left out on purpose")
    if not changes:
        return Outcome(GLOBAL_STATE, title, "ok")
    remedy = "draw from the Draws or a torch.Generator that you are given, and set nothing that others see"
    return Outcome(GLOBAL_STATE, title, "failed", "; ".join(changes), remedy)
