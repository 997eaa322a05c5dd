"""Memory and time of one student turn at a large vocabulary: rows of logits in chunks against all at once.

    OMP_NUM_THREADS=1 python benchmarks/large_vocab.py

Three measurements, each in a process of its own: the turn with all logits at once (plain), with chunks, and with
``features.sum()`` in place of its loss (what the networks themselves need). Memory is the peak above that of the third:
of the process on a CPU, of the tensors on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--chunk-rows", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3, help="turns timed, after one that is not; the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "large_vocab.json")
    parser.add_argument("--measure", choices=("features", "plain", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    command = [sys.executable, __file__, *sys.argv[1:]]
    found: dict[str, dict[str, Any]] = {}
    for kind in ("features", "plain", "chunked"):
        done = subprocess.run([*command, "--measure", kind], stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = json.loads(done.stdout)
        print(kind, found[kind], flush=True)
    machine = found["features"].pop("machine")
    above = {}
    for kind in ("plain", "chunked"):
        assert found[kind].pop("machine") == machine
        above[kind] = found[kind]["peak_bytes"] - found["features"]["peak_bytes"]
    skipped = ("measure", "out")
    content = {
        "command": " ".join(["python benchmarks/large_vocab.py", *sys.argv[1:]]),
        "commit": _commit(),
        "settings": {key: value for key, value in vars(options).items() if key not in skipped},
        "machine": machine,
        "measured": found,
        "bytes_above_features": above,
        "memory_ratio": above["chunked"] / above["plain"],
        "time_ratio": found["chunked"]["seconds"] / found["plain"]["seconds"],
        "cpu_time_ratio": found["chunked"]["cpu_seconds"] / found["plain"]["cpu_seconds"],
        "load_average": os.getloadavg(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    memory, seconds = content["memory_ratio"], content["time_ratio"]
    print(f"chunked as a share of plain: memory above features.sum() {memory:.3f}, time {seconds:.3f}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One kind of turn: seconds of the fastest, by the clock and of the CPU; peak memory of the process or the GPU."""
    import torch

    turn = make_turn(options, options.measure)
    seconds, cpu_seconds = [], []
    for step in range(1 + options.repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        turn(step)
        if torch.device(options.device).type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    if torch.device(options.device).type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        peak, name = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "cpu"
    machine = {
        "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "platform": platform.machine(),
        "python": platform.python_version(), "torch": torch.__version__, "device": name,
    }  # fmt: skip
    return {
        "seconds": min(seconds[1:]), "cpu_seconds": min(cpu_seconds[1:]), "all_seconds": seconds, "peak_bytes": peak,
        "machine": machine,
    }  # fmt: skip


def make_turn(options: argparse.Namespace, kind: str) -> Callable[[int], None]:
    """Build the game and return a function that plays one student's turn, forward and backward."""
    import torch

    from dmmd_backbones.transformer import Transformer
    from dmmd_core import Batch, Draws, NetworkDenoiser
    from dmmd_core.precision import autocast, choose_precision
    from dmmd_generators.noise_conditioned import NoiseConditioned
    from dmmd_objectives import moment_matching
    from dmmd_processes.masked import Masked
    from dmmd_processes.schedules import Linear

    torch.manual_seed(0)
    device = torch.device(options.device)
    dtype = choose_precision("auto", device)
    process = Masked(Masked.Config(), vocab_size=options.vocab_size, schedule=Linear(Linear.Config()))

    def backbone() -> Transformer:
        config = Transformer.Config(width=options.width, depth=options.depth, heads=max(1, options.width // 64))
        return Transformer(
            config, num_inputs=process.num_inputs, vocab_size=options.vocab_size, length=options.length, grid=None,
            num_classes=None,
        )  # fmt: skip

    student = NoiseConditioned(
        NoiseConditioned.Config(), backbone=backbone(), process=process, length=options.length, grid=None
    )
    teacher, auxiliary = (NetworkDenoiser(backbone(), process).requires_grad_(False) for _ in range(2))
    game = moment_matching.MomentMatching(
        moment_matching.MomentMatching.Config(
            turns="alternate", chunk_rows=0 if kind == "plain" else options.chunk_rows, top_p=0.85,
            auxiliary_target="soft",
        ),
        process=process, network=student, teacher=teacher, copy_teacher=lambda: auxiliary, num_steps=16,
    )  # fmt: skip
    for module in (student, game.teacher, auxiliary):
        module.to(device)
    # s near 1, so that nearly all rows carry a loss: the worst case.
    times = tuple(torch.full((1,), time, dtype=torch.float64, device=device) for time in (0.97, 1.0))
    game.draw_times = lambda draws, shape=(): times  # type: ignore[method-assign]
    tokens = Draws.for_range(0, 0, 0, 1, device).integers("tokens", options.vocab_size, (options.length,))
    total = _sum_of_features if kind == "features" else moment_matching.sum_over_rows

    def turn(step: int) -> None:
        student.zero_grad(set_to_none=True)
        with autocast(device, dtype), patch.object(moment_matching, "sum_over_rows", total):
            losses = game.loss(("student",), Batch(tokens), Draws.for_range(0, step, 0, 1, device))
        losses.by_player["student"].backward()

    return turn


def _sum_of_features(rows: Any, row_loss: Any, chunk_rows: int, predictions: Any) -> Any:
    """What the turn would cost if its loss were ``features.sum()``: stands in for `dmmd_core.sum_over_rows`."""
    import torch

    (features,) = predictions[0].sources()
    return torch.stack((features.sum(), *torch.zeros(2, device=features.device)))


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "dmmd_core", "plugins", "benchmarks/*.py")
    return git("rev-parse", "HEAD") + (" with changes" if changed else "")


if __name__ == "__main__":
    raise SystemExit(main())
