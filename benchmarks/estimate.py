"""What a recipe will need on a GPU, without one: operations and memory, counted on tensors that hold no numbers.

    python benchmarks/estimate.py recipes/imagenet_vq.yaml recipes/owt_masked.yaml

Operations are those of matrix products, convolutions and attention, forward and backward, counted by torch. Memory is
that of weights, gradients, optimizer states and moving averages, and of what one sample's forward passes keep for the
backward pass under bfloat16 autocast; logits are left out, for `chunk_rows` bounds them. The time is operations over
`--rate`: an assumption, not a measurement.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from dmmd_core import (
    Batch,
    Denoiser,
    Draws,
    load_plugins,
    load_recipe,
    times_per_position,
    times_per_sample,
    training_condition,
)
from dmmd_core.assemble import Assembly
from dmmd_core.resolve import resolve

FLOAT32 = 4
ADAM = 2 * FLOAT32


@dataclass(frozen=True)
class Cost:
    """Of networks and one sample.

    Attributes:
        parameters: Their number.
        forward: Operations of a forward pass.
        both: Operations of forward and backward.
        kept: Bytes that one sample's forward pass keeps for the backward pass.
        copies: Bytes of the weights' bfloat16 copies that any forward pass keeps.
    """

    parameters: int
    forward: int
    both: int
    kept: int
    copies: int


def main() -> int:
    """Parse the command line, count, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--rate", type=float, default=4e14, help="operations a second that the time assumes")
    options = parser.parse_args()
    print("| recipe | stage | samples | parameters | fixed memory | a sample | operations a step | all steps |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for path in options.recipes:
        for row in rows_of(path, options.rate):
            print("| " + " | ".join(row) + " |")
    return 0


def rows_of(path: Path, rate: float) -> list[list[str]]:
    """A row for the teacher's training and one for the distillation."""
    recipe = load_recipe(path)
    with tempfile.TemporaryDirectory() as cache, FakeTensorMode():
        assembly = Assembly(resolve(recipe, load_plugins(), outside=False), Path(cache))
        teacher = cost_of(assembly.network(), assembly)
        student = cost_of(assembly.generator(assembly.backbone()), assembly)
    trained = 2 * FLOAT32 + ADAM + FLOAT32  # weights, gradients, optimizer states, moving average
    rows = []
    train, distill = recipe.teacher.train, recipe.distill
    if train is not None:
        fixed = teacher.parameters * trained + teacher.copies
        rows.append(row(path, "teacher", train.steps, train.batch_size, teacher, fixed, rate))
    # Both turns on one draw: student and auxiliary forward and backward, the teacher forward, twice if it is guided.
    guided = recipe.objective.params.get("guidance", 1.0) != 1.0
    total = Cost(
        student.parameters + 2 * teacher.parameters,
        0,
        student.both + teacher.both + teacher.forward * (2 if guided else 1),
        student.kept + teacher.kept,
        student.copies + teacher.copies,
    )
    # The auxiliary has no moving average, the teacher nothing but weights.
    fixed = student.parameters * trained + teacher.parameters * trained + total.copies
    rows.append(row(path, "distill", distill.steps, distill.batch_size, total, fixed, rate))
    return rows


def row(path: Path, stage: str, steps: int, batch: int, cost: Cost, fixed: int, rate: float) -> list[str]:
    """One line of the table."""
    operations = cost.both * batch
    hours = operations * steps / rate / 3600
    return [
        path.stem, stage, f"{batch}", f"{cost.parameters / 1e6:.0f} M", f"{fixed / 1e9:.1f} GB",
        f"{cost.kept / 1e6:.0f} MB", f"{operations / 1e12:.1f}e12", f"{hours:.0f} h",
    ]  # fmt: skip


def cost_of(denoiser: Denoiser, assembly: Assembly) -> Cost:
    """Count passes through features and head, as in training."""
    forward, _, one = passes(denoiser, assembly, 1, backward=False)
    both, parameters, two = passes(denoiser, assembly, 2, backward=True)
    return Cost(parameters, forward, both // 2, two - one, 2 * one - two)


def passes(denoiser: Denoiser, assembly: Assembly, size: int, backward: bool) -> tuple[int, int, int]:
    """Operations of passes with `size` samples, number of parameters, bytes kept for the backward pass."""
    assert assembly.spec is not None
    tokens = torch.zeros(size, assembly.spec.length, dtype=torch.int64)
    batch = Batch(tokens, None if assembly.spec.num_classes is None else tokens[:, 0])
    draws = Draws.for_range(0, 0, 0, size)
    t = times_per_position(denoiser, draws.uniform("t", times_per_sample(denoiser, batch)))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                condition = training_condition(denoiser, batch)
                prediction = denoiser(tokens, t, condition, denoiser.draw_latent(draws))
            bytes_kept = sum(kept.values())
            backbone: Any = denoiser.backbone  # of teacher, auxiliary and student alike
            logits = backbone.head(prediction.sources()[0])
        if backward:
            logits.float().sum().backward()
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    return int(counter.get_total_flops()), parameters, bytes_kept


def _attention_forward(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _attention_backward(
    incoming: Any, query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(incoming, query, key, value))


ATTENTION = {  # the CPU's kernels, which torch does not count
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


if __name__ == "__main__":
    raise SystemExit(main())
