"""The benchmarks' own arithmetic."""

from __future__ import annotations

import importlib.util
import json
import sys
from types import ModuleType

import pytest
import torch
from helpers import ROOT

from dmmd_core import Draws, load_plugins, load_recipe
from dmmd_core.assemble import Assembly
from dmmd_core.interfaces import Condition
from dmmd_core.resolve import resolve


def benchmark(name: str) -> ModuleType:
    """Import one of the scripts in ``benchmarks/``."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def test_estimate_counts_what_hooks_count():
    """Operations of linear layers by hooks on a real pass, of attention by hand."""
    plan = resolve(load_recipe(ROOT / "recipes" / "quickstart.yaml"), load_plugins())
    assembly = Assembly(plan)
    network = assembly.network()
    length, width = assembly.spec.length, 64
    counted = []

    def count(module, arguments, result):
        if isinstance(module, torch.nn.Linear):
            counted.append(2 * module.weight.numel() * result.numel() // result.shape[-1])

    for module in network.modules():
        module.register_forward_hook(count)
    draws = Draws.for_range(0, 0, 0, 1)
    network(torch.zeros(1, length, dtype=torch.int64), draws.uniform("t"), Condition()).log_probs()
    attention = 3 * 2 * 2 * length * length * width  # three layers, two products
    cost = benchmark("estimate").cost_of(assembly.network(), Assembly(plan))
    assert cost.forward == sum(counted) + attention
    # The first layer's input, the time, wants no gradient; the attention's backward pass computes one product again.
    assert cost.both == 3 * sum(counted) - counted[0] + 3.5 * attention
    assert cost.parameters == sum(parameter.numel() for parameter in network.parameters())


def test_estimate_shows_a_row_for_each_stage(capsys, monkeypatch):
    """A table in Markdown; the distillation holds three networks."""
    monkeypatch.setattr("sys.argv", ["estimate.py", str(ROOT / "recipes" / "quickstart.yaml"), "--rate", "1e12"])
    assert benchmark("estimate").main() == 0
    lines = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines[2:]] == [["quickstart", "teacher", "128"], ["quickstart", "distill", "64"]]


def test_device_step_measures_a_recipe_whose_data_are_not_there(tmp_path, monkeypatch):
    """ImageNet's recipe with a small transformer, without pictures and tokenizer."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "out.json"
    small = [f"backbone.params.{key}" for key in ("width=64", "depth=1", "heads=2")]
    sizes = ["--batch", "1", "--samples", "1", "--repeats", "1", "--attention", "sdpa", "--device", "cpu"]
    recipe = str(ROOT / "recipes" / "imagenet_vq.yaml")
    monkeypatch.setattr("sys.argv", ["device_step.py", recipe, *small, *sizes, "--out", str(out)])
    assert benchmark("device_step").main() == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["kernel"] == "sdpa"
    for part in ("train", "sampling_step"):
        assert 0 < row[part]["share_of_matrix_rate"] < 1.5
        assert row[part]["operations"] > 2 * 256 * 8192 * 64  # at least the head's


@pytest.mark.gpu
def test_attention_kernels_side_by_side_on_a_gpu(tmp_path, monkeypatch):
    """Both kernels run the same step in bfloat16."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    out = tmp_path / "out.json"
    recipe = str(ROOT / "recipes" / "imagenet_vq.yaml")
    monkeypatch.setattr("sys.argv", ["device_step.py", recipe, "--batch", "4", "--samples", "4", "--out", str(out)])
    assert benchmark("device_step").main() == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["attention"] for row in rows] == ["sdpa", "xformers"]
    assert all(row["precision"] == "bfloat16" and row["train"]["peak_bytes"] > 0 for row in rows)
