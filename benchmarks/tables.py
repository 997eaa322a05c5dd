"""Turn the result files of `vary.py` into the tables of ``docs/results.md``.

    python benchmarks/tables.py benchmarks/results/exact_markov_masked.json

Every cell lists all runs in the order of the file, then their mean.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def table(path: Path) -> str:
    """Render one result file as Markdown: how it was made, then a row per model and number of steps."""
    content = json.loads(path.read_text())
    runs = content["runs"]
    rows = [row for run in runs for row in run["results"]]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    subjects = list(dict.fromkeys((row["model"], row["num_steps"]) for row in rows))
    machine = content["machine"]
    seconds = [sum(s for s in run["timing"].values() if isinstance(s, int | float)) for run in runs]
    lines = [
        f"`{content['command']}`, commit {content['commit']}, {machine['cpu_count']} CPU cores "
        f"({machine['platform']}), {machine['threads']} thread(s) a process, "
        f"{min(seconds):.0f} to {max(seconds):.0f} s a run.",
        "",
        "Runs: " + "; ".join(", ".join(run["settings"]) for run in runs) + ".",
        "",
    ]
    for metric in metrics:
        lines += [f"| {metric} | steps | runs | mean |", "| --- | ---: | --- | ---: |"]
        for model, steps in subjects:
            values = [r["value"] for r in rows if (r["metric"], r["model"], r["num_steps"]) == (metric, model, steps)]
            if values:
                listing = " ".join(f"{value:.3g}" for value in values)
                lines.append(f"| {model} | {steps or ''} | {listing} | {statistics.mean(values):.3g} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(table(Path(name)))
