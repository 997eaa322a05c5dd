"""The campaign of faults in a size for every day, and that it finds what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers import ROOT, environment


def _campaign(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fault_campaign.py"), "--quick", "--out", str(out), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False
    )
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text())["trials"], done.stdout


def test_faults_end_identical_or_refused_and_never_wrong(tmp_path: Path) -> None:
    code, trials, told = _campaign(tmp_path / "out.json")
    assert [trial for trial in trials if trial["outcome"] == "WRONG"] == []
    assert code == 0
    assert {trial["kind"] for trial in trials} == {"kill", "damage", "disk", "numbers"}
    assert {"identical", "refused"} <= {trial["outcome"] for trial in trials}
    assert "| SIGKILL, then the same command |" in told


def test_a_campaign_finds_faults_that_are_planted_in_the_product(tmp_path: Path) -> None:
    """Finished stages forgotten, figures misread, messages without words: none of it may pass."""
    counts = ["--kill", "1", "--damage", "3", "--disk", "0", "--numbers", "2"]
    code, trials, _ = _campaign(tmp_path / "out.json", "--plant", *counts)
    wrong = {trial["kind"]: trial["detail"] for trial in trials if trial["outcome"] == "WRONG"}
    assert code == 1
    assert wrong.keys() == {"kill", "damage", "numbers"}
    assert wrong["kill"].startswith("finished and done again")
    assert wrong["damage"].startswith("silently different: figures")
    assert wrong["numbers"].startswith("the message names none of")
