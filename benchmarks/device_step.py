"""One training step and one sampling step of a recipe at full size: time, memory, share of the chip's matrix rate.

    python benchmarks/device_step.py recipes/imagenet_vq.yaml --batch 64
    python benchmarks/device_step.py recipes/owt_masked.yaml --batch 16 run.compile=true

Tokens are random, so neither data nor hub are needed. The step is all turns of the recipe's objective on one draw,
forward and backward, without the optimizer; its operations are counted as in `estimate.py`. The matrix rate is that of
one large product in the recipe's precision, measured in the same run. ``run.compile`` and
``run.activation_checkpointing`` are those of the recipe. Every attention kernel that is asked for is
measured on the same weights and batches.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from estimate import cost_of
from torch._subclasses.fake_tensor import FakeTensorMode

from dmmd_core import Batch, Draws, load_plugins, load_recipe
from dmmd_core.assemble import Assembly
from dmmd_core.compilation import checkpoint_units, compile_units
from dmmd_core.precision import AutocastSampler, autocast, choose_device, choose_precision
from dmmd_core.recipe import Recipe
from dmmd_core.resolve import resolve

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Parse the command line, measure every kernel, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", help="key=value, as for dmmd-run")
    parser.add_argument("--batch", type=int, default=32, help="samples of the training step")
    parser.add_argument("--samples", type=int, default=32, help="samples of the sampling step")
    parser.add_argument("--attention", nargs="+", default=["sdpa", "xformers"], help="kernels to compare")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed repetitions after two that are not; the median")
    parser.add_argument("--out", type=Path)
    options = parser.parse_intermixed_args()
    device = choose_device(options.device)
    rows = []
    rate = None
    for kernel in options.attention:
        overrides = [*options.overrides, f"backbone.params.attention={kernel}"]
        recipe = load_recipe(options.recipe, [f"run.device={device}", *overrides])
        precision = choose_precision(recipe.run.precision, device)
        rate = rate or matrix_rate(device, precision, 8192 if device.type == "cuda" else 1024)
        rows.append({"attention": kernel, **measure(recipe, device, precision, options, rate)})
        print(json.dumps(rows[-1]), flush=True)
    content = {
        "command": " ".join(["python benchmarks/device_step.py", *sys.argv[1:]]),
        "machine": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "cpu_count": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "matrix_rate": rate,
        "rows": rows,
    }  # fmt: skip
    out = options.out or ROOT / "benchmarks" / "results" / f"device_step_{options.recipe.stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return 0


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of one square matrix product."""
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: left @ right, device, 20)


def median_seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Time of `work`, after two runs that do not count."""
    seconds = []
    for index in range(2 + repeats):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    return sorted(seconds)[len(seconds) // 2]


def measure(
    recipe: Recipe, device: torch.device, precision: torch.dtype, options: argparse.Namespace, rate: float
) -> dict[str, Any]:
    """Both steps with one attention kernel."""
    plan = resolve(recipe, load_plugins(), outside=False)
    with tempfile.TemporaryDirectory() as cache:
        assembly = Assembly(plan, Path(cache))
        with FakeTensorMode():
            teacher_cost = cost_of(assembly.network(), assembly)
            student_cost = cost_of(assembly.generator(assembly.backbone()), assembly)
        teacher = assembly.network().to(device).requires_grad_(False)
        student = assembly.generator(copy.deepcopy(teacher.backbone).requires_grad_(True)).to(device)
        game = assembly.objective(
            plan.objective, network=student, teacher=teacher, num_steps=recipe.distill.num_steps,
            training_steps=recipe.distill.steps,
            copy_teacher=lambda: copy.deepcopy(teacher).requires_grad_(True),
        )  # fmt: skip
        networks = [*(player.module for player in game.players().values()), *game.frozen().values()]
        for module in networks if recipe.run.activation_checkpointing else ():
            checkpoint_units(module)
        for module in networks if recipe.run.compile else ():
            compile_units(module)
        assert assembly.spec is not None
        spec = assembly.spec
        draws = Draws.for_range(0, 0, 0, options.batch, device)
        tokens = draws.integers("tokens", spec.vocab_size, (spec.length,))
        labels = None if spec.num_classes is None else draws.integers("labels", spec.num_classes)
        turn = tuple(game.players())

        def train() -> None:
            for player in game.players().values():
                player.module.zero_grad(set_to_none=True)
            with autocast(device, precision):
                losses = game.loss(turn, Batch(tokens, labels), draws)
            torch.stack(list(losses.by_player.values())).sum().backward()

        kept = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        train_seconds = median_seconds(train, device, options.repeats)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        guided = recipe.objective.params.get("guidance", 1.0) != 1.0
        operations = options.batch * (student_cost.both + teacher_cost.both + teacher_cost.forward * (1 + guided))
        student.eval()
        sampler = AutocastSampler(assembly.sampler, device, precision)
        steps = recipe.distill.num_steps
        sampled = Draws.for_range(0, 0, 0, options.samples, device)
        with torch.no_grad():
            sample_seconds = median_seconds(
                lambda: sampler.sample(student, sampled, num_steps=steps), device, options.repeats
            )
    sampling = options.samples * student_cost.forward
    return {
        "kernel": teacher.backbone.description().get("attention"), "precision": str(precision).removeprefix("torch."),
        "train": {
            "batch": options.batch, "seconds": train_seconds, "operations": operations,
            "tokens_per_second": options.batch * spec.length / train_seconds,
            "share_of_matrix_rate": operations / train_seconds / rate,
            "weights_bytes": kept, "peak_bytes": peak,
        },
        "sampling_step": {
            "samples": options.samples, "seconds": sample_seconds / steps, "operations": sampling,
            "share_of_matrix_rate": sampling * steps / sample_seconds / rate,
        },
    }  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
