"""Clauses for schedules."""

from __future__ import annotations

import torch

from dmmd_core.interfaces import Schedule
from dmmd_core.testing.report import clause, expect, expect_close
from dmmd_core.testing.subject import GENERAL, Case


def times(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Times inside (0, 1), away from the ends."""
    return torch.linspace(0.02, 0.98, 49, dtype=dtype)


@clause("ends", remedy="write alpha so that t = 0 and t = 1 give 1 and 0 without rounding, and clamp")
def ends(case: Case) -> None:
    """`alpha` is 1 at t = 0 and 0 at t = 1, to the last bit, in float32 and float64."""
    for dtype in (torch.float32, torch.float64):
        got = case.component.alpha(torch.tensor([0.0, 1.0], dtype=dtype)).tolist()
        expect(got == [1.0, 0.0], f"in {dtype}, alpha is {got[0]!r} at t = 0 and {got[1]!r} at t = 1")


@clause("falls", remedy="let alpha fall with time")
def falls(case: Case) -> None:
    """`alpha` stays in [0, 1] and falls with time."""
    alpha = case.component.alpha(times())
    low, high = float(alpha.min()), float(alpha.max())
    expect(low >= 0 and high <= 1, f"alpha leaves [0, 1]: {low}..{high}")
    rising = (alpha[1:] >= alpha[:-1]).nonzero().flatten()
    if len(rising):
        t = times()[rising[0]]
        expect(False, f"alpha does not fall after t = {float(t):.3f}")


@clause("slope", remedy="derive alpha_prime from alpha again")
def slope(case: Case) -> None:
    """`alpha_prime` is the derivative of `alpha`, by finite differences in float64."""
    schedule: Schedule = case.component
    t, step = times(), 1e-6
    wanted = (schedule.alpha(t + step) - schedule.alpha(t - step)) / (2 * step)
    got = schedule.alpha_prime(t)
    scale = float(wanted.abs().max()) + 1
    expect_close(got / scale, wanted / scale, "alpha_prime, in units of its largest value plus 1,", tolerance=1e-6)


@clause("form", remedy="compute with the tensor that came in; keep its shape and dtype")
def form(case: Case) -> None:
    """`alpha` and `alpha_prime` keep shape and dtype, and do not change their argument."""
    for dtype in (torch.float32, torch.float64):
        t = times(dtype)[:6].reshape(2, 3)
        before = t.clone()
        for name in ("alpha", "alpha_prime"):
            got = getattr(case.component, name)(t)
            expect(got.shape == t.shape, f"{name} of shape {list(t.shape)} gives {list(got.shape)}")
            expect(got.dtype == dtype, f"{name} of {dtype} gives {got.dtype}")
        expect(torch.equal(t, before), "the times that were passed in have been changed")


CLAUSES = (*GENERAL, ends, falls, slope, form)
