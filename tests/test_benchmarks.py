"""The benchmarks' own arithmetic."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from types import ModuleType

import pytest
import torch
import yaml
from helpers import ROOT, make_run, tiny_recipe

from dmmd_core import Draws, NetworkDenoiser, load_plugins, load_recipe
from dmmd_core.assemble import Assembly
from dmmd_core.interfaces import Condition
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain
from dmmd_samplers.ancestral import Ancestral


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


class _Counted:
    """Network passes of an objective: three with a graph, one without."""

    def __init__(self, inner):
        self.inner, self.passes = inner, 0
        inner.register_forward_hook(self._count)

    def _count(self, module, arguments, result):
        examples = len(arguments[0]) / 8
        self.passes += examples * (3 if torch.is_grad_enabled() else 1)


@pytest.mark.parametrize("name", ["moment_matching", "sdtt", "dimo", "idlm", "di4c", "dcd"])
def test_the_passes_of_a_method_are_those_that_its_objective_makes(name, tmp_path):
    compare = benchmark("compare")
    method = compare.METHODS[name]
    recipe = tiny_recipe(tmp_path, objective={"name": name, "params": method.params or {}})
    recipe["process"] = {"name": method.noise[0]}
    recipe["distill"]["num_steps"] = 1
    assembly = make_run(recipe).assembly
    start = assembly.network()
    networks = [assembly.generator(copy.deepcopy(start.backbone)), copy.deepcopy(start), copy.deepcopy(start)]
    counted = [_Counted(network) for network in networks]
    student, teacher, auxiliary = networks
    part = make_run(recipe).plan.objective
    objective = assembly.objective(
        part, network=student, teacher=teacher, copy_teacher=lambda: auxiliary, num_steps=1, training_steps=600
    )
    steps = 6  # whole cycles of turns
    for step in range(steps):
        draws = Draws.for_range(0, step, 0, 8)
        objective.loss(objective.turn(step), assembly.data.training_batch(draws), draws)
    assert sum(one.passes for one in counted) / steps == pytest.approx(method.passes)


def _measured(made, directory):
    """What a run would give, were quality the number of updates times a method's best learning rate."""
    best = {"moment_matching": 3e-4, "idlm": 3e-3}.get(made["objective"]["name"], 1e-3)
    off = abs(math.log(made["distill"]["optimizer"]["learning_rate"] / best))
    value = 1 / made["distill"]["steps"] + off + made["run"]["seed"] / 1000
    rows = [("student", steps, value / steps) for steps in made["evaluate"]["student_steps"]]
    rows += [("teacher", steps, 1 / steps) for steps in made["evaluate"]["teacher_steps"]]
    results = [{"metric": "total_variation", "model": m, "num_steps": n, "value": v} for m, n, v in rows]
    return {"results": results, "timing": {}}


def test_compare_tunes_every_method_and_gives_it_equal_iterations_and_passes(tmp_path, monkeypatch, capsys):
    compare = benchmark("compare")
    made = []

    def run(recipe, directory, **_):
        made.append((recipe, directory.name))
        return _measured(recipe, directory)

    monkeypatch.setattr(compare, "run_recipe", run)
    places = [f"--{name}={tmp_path / name}" for name in ("runs", "out", "plots")]
    monkeypatch.setattr("sys.argv", ["compare.py", "coins", "--seeds", "2", *places])
    assert compare.main() == 0
    content = json.loads((tmp_path / "out" / "compare_coins_cpu.json").read_text())
    assert content["chosen"] == {"moment_matching": 3e-4, "sdtt": 1e-3, "dimo": 1e-3, "idlm": 3e-3, "di4c": 1e-3}
    assert (tmp_path / "plots" / "compare_coins_cpu.png").stat().st_size > 1000
    names = [name for _, name in made]
    assert len(names) == len(set(names))
    reference = compare.TASKS["coins"].sizes["cpu"]["distill.steps"]
    for recipe, name in made:
        method = compare.METHODS[name.split("-")[0]]
        spent = recipe["distill"]["steps"] * method.passes
        if "-passes-" in name:
            assert spent == pytest.approx(7 * reference, abs=method.passes)
        else:
            assert recipe["distill"]["steps"] == reference
        assert recipe["distill"]["optimizer"]["beta1"] == method.beta1
        resolve(recipe_from_plain(recipe, name), load_plugins())  # valid, every one
    told = capsys.readouterr().out
    assert "| moment_matching | iterations | 0.0003 | 2000 |" in told
    assert "| di4c | passes | 0.001 | 824 |" in told


@pytest.mark.parametrize("name", sorted(benchmark("compare").TASKS))
def test_compare_measures_every_method_where_it_was_trained(name, tmp_path):
    compare = benchmark("compare")
    task = compare.TASKS[name]
    recipe = yaml.safe_load((compare.ROOT / "recipes" / f"{task.recipe}.yaml").read_text(encoding="utf-8"))
    for form in ("cpu", "gpu"):
        for method in compare.METHODS:
            job = compare.Job(method, "updates", 1e-3, 0)
            made = compare.make_recipe(task, recipe, job, form, tmp_path / "one", None)
            assert made["distill"]["num_steps"] in task.student_steps, (form, method)


def test_compare_never_takes_the_figures_of_another_recipe(tmp_path):
    compare = benchmark("compare")
    compare.write(tmp_path / "a.yaml", "distill: {steps: 1}\n")
    with pytest.raises(SystemExit, match="is another recipe than this run's"):
        compare.run_recipe({"distill": {"steps": 2}}, tmp_path / "a")


def test_compare_stops_where_a_run_is_refused_and_goes_on_where_its_training_broke_down(tmp_path):
    compare = benchmark("compare")
    base, recipe = tmp_path / "base", tiny_recipe(tmp_path)
    compare.write(base / "cache" / "network-0123" / "model.safetensors", "weights")
    with pytest.raises(SystemExit, match="run the same command to go on"):
        compare.run_recipe(recipe | {"schema": 99}, tmp_path / "refused", base=base)
    recipe["distill"] |= {"optimizer": {"learning_rate": 1e30}, "skip_limit": 1}
    recipe["run"] |= {"directory": str(tmp_path / "broke")}
    assert compare.run_recipe(recipe, tmp_path / "broke", base=base) is None
    assert (tmp_path / "broke" / "cache" / "network-0123" / "model.safetensors").exists()


def test_the_sampler_that_ancestral_is_timed_against_draws_from_the_same_distribution():
    """Its clean probabilities are the denoiser's; a step shows a token with probability 1 - s / t."""
    engine = benchmark("engine")
    size = {"vocab_size": 5, "length": 6, "width": 32, "depth": 1}
    process, backbone = engine._network(size, "cpu")
    theirs, ours = engine.MdlmSampler(backbone, 5), NetworkDenoiser(backbone, process).eval()
    count, t, s = 4000, 0.8, 0.5
    z = torch.tensor([[5, 5, 1, 5, 5, 3]]).expand(count, -1)
    with torch.no_grad():
        clean = theirs.clean_probs(z, t)
        expected = ours(z, torch.full((count,), t)).log_probs().exp().unflatten(0, z.shape)
        assert torch.allclose(clean[..., :5], expected, atol=1e-6)
        torch.manual_seed(0)
        drawn = theirs.step(z, t, s)
        assert torch.equal(theirs.step(z, t, s, clean)[:, 2], z[:, 2])
    assert torch.equal(drawn[:, [2, 5]], z[:, [2, 5]])
    at_first = drawn[:, 0].bincount(minlength=6) / count
    wanted = torch.cat((clean[0, 0, :5] * (1 - s / t), torch.tensor([s / t])))
    # Six standard deviations of a frequency.
    assert bool(((at_first - wanted).abs() <= 6 * (wanted * (1 - wanted) / count).sqrt() + 1e-6).all())


def test_the_engine_is_measured_by_one_command(tmp_path, monkeypatch):
    out = tmp_path / "engine.json"
    parts = ["iteration", "sampling", "mdlm"]
    monkeypatch.setattr("sys.argv", ["engine.py", *parts, "--small", "--repeats", "1", "--out", str(out)])
    assert benchmark("engine").main() == 0
    found = json.loads(out.read_text())
    assert set(found) == set(parts)
    assert set(found["iteration"]["over_limit"]) == {"joint", "alternate", "teacher"}
    assert found["sampling"]["tiny"]["over_bare"] > 0
    assert found["mdlm"]["run_of_64"]["mdlm_over_ours"] > 0


def test_a_mixture_of_one_models_steps_is_what_the_sampler_draws(tmp_path, monkeypatch):
    """Steps of the student alone, or of the teacher alone, bit for bit; and both in one sample differ from either."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reference = {"name": "causal_transformer", "params": {"width": 8, "depth": 1, "steps": 2}}
    metric = {"name": "gradient_moment", "params": {"batch_size": 4, "reference": reference}}
    recipe = tiny_recipe(
        tmp_path,
        data={"name": "text", "params": {"length": 16, "tokenizer": {"name": "byte"}}},
        backbone={"name": "transformer", "params": {"width": 8, "depth": 1, "heads": 1}},
        teacher={"objective": {"name": "denoising"}, "train": {"steps": 2, "batch_size": 4}},
        distill={"num_steps": 2, "steps": 2, "batch_size": 4},
        evaluate={"teacher_steps": [], "student_steps": [2], "num_samples": 16, "metrics": [metric]},
    )
    make_run(recipe).execute()
    weak_steps, run, out = benchmark("weak_steps"), tmp_path / "run", tmp_path / "weak_steps.json"
    judge = weak_steps.Mixed(run)
    sampler = Ancestral(Ancestral.Config(), process=judge.assembly.process, length=judge.assembly.spec.length)

    def drawn(model, steps):
        return sampler.sample(model, Draws.for_range(0, 0, 0, 16), num_steps=steps).tokens

    students, teachers = judge.tokens("ssss", 16, 1), judge.tokens("tttt", 16, 2)
    assert torch.equal(students, drawn(judge.student, 4))
    assert torch.equal(teachers, drawn(judge.denoiser, 8))
    mixed = judge.tokens("ttss", 16, 1)
    assert not torch.equal(mixed, students)
    assert int(mixed.max()) < judge.assembly.process.vocab_size
    monkeypatch.setattr(sys, "argv", ["weak_steps", str(run), "ss", "ts", "--num", "16", "--out", str(out)])
    assert weak_steps.main() == 0
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["ss", "ts"]
