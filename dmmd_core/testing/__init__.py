"""Conformance kit: does a component keep the contract of its kind? For plugins in this tree and for anybody's.

One line in a test::

    from dmmd_core.testing import check_process

    def test_conformance():
        check_process(MyProcess, {"share": 0.3})

or one on the command line: ``dmmd-run --conformance process:my_process share=0.3``.
"""

from __future__ import annotations

from dmmd_core.testing.judge import (
    check_backbone,
    check_component,
    check_data,
    check_generator,
    check_metric,
    check_objective,
    check_observer,
    check_process,
    check_sampler,
    check_schedule,
    clauses_of,
    judge,
    kits,
)
from dmmd_core.testing.report import Clause, ConformanceError, Outcome, Report

__all__ = [
    "Clause",
    "ConformanceError",
    "Outcome",
    "Report",
    "check_backbone",
    "check_component",
    "check_data",
    "check_generator",
    "check_metric",
    "check_objective",
    "check_observer",
    "check_process",
    "check_sampler",
    "check_schedule",
    "clauses_of",
    "judge",
    "kits",
]
