"""The process keeps the contract of its kind."""

from __future__ import annotations

import pytest

from dmmd_core.testing import check_process


@pytest.mark.parametrize("mask_share", [0.1, 0.5])
def test_the_process_keeps_its_contract(mask_share: float) -> None:
    check_process("hybrid", {"mask_share": mask_share})
