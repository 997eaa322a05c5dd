"""Memory and time of one student turn at a large vocabulary: rows of logits in chunks against all at once.

    python benchmarks/large_vocab.py

Three measurements, each in a process of its own: the turn with all logits at once (plain), with chunks, and with
``features.sum()`` in place of the loss (what the network itself needs). Memory is the peak above that of the third.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Parse the command line, measure, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--chunk-rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="turns timed; the fastest counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "large_vocab.json")
    parser.add_argument("--measure", choices=("plain", "chunked", "features"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options)))
        return 0
    command = [sys.executable, __file__, *sys.argv[1:]]
    found: dict[str, dict[str, float]] = {}
    for kind in ("features", "plain", "chunked"):
        done = subprocess.run([*command, "--measure", kind], stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = json.loads(done.stdout)
        print(kind, found[kind], flush=True)
    base = found["features"]["peak_bytes"]
    above = {kind: found[kind]["peak_bytes"] - base for kind in ("plain", "chunked")}
    content = {
        "command": " ".join(["python benchmarks/large_vocab.py", *sys.argv[1:]]),
        "settings": {key: str(value) for key, value in vars(options).items() if key not in ("measure", "out")},
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.machine(), "python": platform.python_version()},
        "measured": found,
        "memory_ratio": above["chunked"] / above["plain"],
        "time_ratio": found["chunked"]["seconds"] / found["plain"]["seconds"],
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")
    memory, seconds = content["memory_ratio"], content["time_ratio"]
    print(f"chunked as a share of plain: memory above features.sum() {memory:.3f}, time {seconds:.3f}")
    return 0


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One kind of turn: seconds of the fastest, and the peak memory of the process (or device)."""
    import torch

    from dmmd_backbones.transformer import Transformer
    from dmmd_core import Batch, Draws, NetworkDenoiser
    from dmmd_generators.noise_conditioned import NoiseConditioned
    from dmmd_objectives.moment_matching import MomentMatching
    from dmmd_processes.masked import Masked
    from dmmd_processes.schedules import Linear

    torch.manual_seed(0)
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
    chunk = options.chunk_rows if options.measure == "chunked" else 0
    game = MomentMatching(
        MomentMatching.Config(turns="alternate", chunk_rows=chunk, top_p=0.9, auxiliary_target="soft"),
        process=process, network=student, teacher=teacher, copy_teacher=lambda: auxiliary, num_steps=16,
    )  # fmt: skip
    for module in (student, game.teacher, auxiliary):
        module.to(options.device)
    # s near 1, so that nearly all rows carry a loss: the worst case.
    game.draw_times = lambda draws: (torch.full((1,), 0.97, dtype=torch.float64, device=draws.device),) * 2  # type: ignore[method-assign]
    draws = Draws.for_range(0, 0, 0, 1, options.device)
    batch = Batch(draws.integers("tokens", options.vocab_size, (options.length,)))

    def turn() -> None:
        student.zero_grad(set_to_none=True)
        if options.measure != "features":
            game.loss(("student",), batch, draws).by_player["student"].backward()
        else:
            t = torch.full((1,), 0.97, dtype=torch.float64, device=options.device)
            z = process.corrupt(batch.tokens, t, draws)
            features = student.backbone.features(z, t, _no_condition(), student.input_noise(student.draw_latent(draws)))
            with torch.no_grad():
                for denoiser in (teacher, auxiliary):
                    denoiser(z, t)
            (features.sum() + 0.0 * student.backbone.logits.weight.sum()).backward()

    turn()
    seconds = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        turn()
        if options.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    if options.device.startswith("cuda"):
        peak = float(torch.cuda.max_memory_allocated())
    else:
        peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": min(seconds), "peak_bytes": peak}


def _no_condition() -> Any:
    from dmmd_core import Condition

    return Condition()


if __name__ == "__main__":
    raise SystemExit(main())
