"""Run a recipe at every combination of some of its values and collect the figures as JSON.

    python benchmarks/vary.py recipes/exact_markov_masked.yaml --vary data.params.seed=0,1,2 --vary run.seed=0,1,2

Every combination is an ordinary run in a directory of its own below ``--runs``; run the command again to go on where
it stopped. The result goes to ``benchmarks/results/<recipe>.json``, and a table to the terminal.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Parse the command line, run everything, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--vary", action="append", default=[], metavar="KEY=A,B,C", help="values to go through")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override for every run")
    parser.add_argument("--runs", type=Path, default=Path("runs/vary"), help="where the runs go")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<recipe>.json)")
    options = parser.parse_args()
    axes = [[f"{key}={value}" for value in values.split(",")] for key, _, values in map(_split, options.vary)]
    rows: list[dict[str, Any]] = []
    commit = _commit()  # of the code that the runs start from
    for settings in itertools.product(*axes):
        name = "-".join([options.recipe.stem, *(text.replace("=", "_") for text in settings)])
        directory = options.runs / name
        command = [sys.executable, "-m", "dmmd_core", str(options.recipe), *settings, *options.set]
        subprocess.run([*command, f"run.directory={directory}"], check=True)
        metrics = json.loads((directory / "metrics.json").read_text())
        rows.append({"settings": list(settings), "results": metrics["results"], "timing": metrics["timing"]})
    told = [f"--vary {text}" for text in options.vary] + [f"--set {text}" for text in options.set]
    content = {
        "recipe": options.recipe.name,
        "command": " ".join(["python benchmarks/vary.py", f"recipes/{options.recipe.name}", *told]),
        "commit": commit,
        "machine": {
            "cpu_count": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "default"),
            "platform": platform.machine(),
            "python": platform.python_version(),
        },
        "runs": rows,
    }
    out = options.out or ROOT / "benchmarks" / "results" / f"{options.recipe.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    print_table(rows)
    return 0


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print every run's figures, and their means, by metric."""
    keys = list(dict.fromkeys((r["metric"], r["model"], r["num_steps"]) for row in rows for r in row["results"]))
    for metric, model, steps in keys:
        values = [
            r["value"] for row in rows for r in row["results"] if (r["metric"], r["model"], r["num_steps"])
            == (metric, model, steps)
        ]  # fmt: skip
        listing = " ".join(f"{value:.4f}" for value in values)
        print(f"{metric:30} {model:8} {steps:3}  mean {statistics.mean(values):.4f}  all {listing}")


def _split(text: str) -> tuple[str, str, str]:
    key, equals, values = text.partition("=")
    if not equals:
        raise SystemExit(f"--vary takes KEY=A,B,C, got {text!r}")
    return key, equals, values


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
