"""Choices of the engine that do not change what is computed: parts of batches, recomputation, compilation, kernels."""

from __future__ import annotations

import copy
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_run, tiny_recipe
from torch import Tensor

from dmmd_core import Condition, FieldError, RecipeError, load_plugins
from dmmd_core.compilation import checkpoint_units, compile_units, units_of
from dmmd_core.pipeline import Run
from dmmd_core.precision import tf32_matrix_products
from dmmd_core.recipe import TrainSection
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain
from dmmd_core.train import Trainer


def _trainer(tmp_path: Path, run: dict[str, Any] | None = None, dropout: float = 0.0, **changes: Any) -> Trainer:
    recipe = tiny_recipe(tmp_path)
    recipe["distill"] = {"num_steps": 2, "steps": 6, "batch_size": 10, **changes}
    params = {"width": 16, "heads": 2, "depth": 2, "dropout": dropout}
    recipe["teacher"] = {"objective": {"name": "denoising"}, "train": {"steps": 1}}
    recipe["backbone"] = {"name": "transformer", "params": params}
    recipe["run"] |= run or {}
    made = make_run(recipe)
    made.stage = "distill"
    network = made.assembly.network()
    objective = made.assembly.objective(
        made.plan.objective,
        network=made.assembly.generator(made.assembly.backbone()),
        teacher=network,
        copy_teacher=made.assembly.network,
        num_steps=2,
        training_steps=6,
    )
    with torch.no_grad():  # heads and gates start at zero; here everything must have a gradient
        generator = torch.Generator().manual_seed(1)
        for player in objective.players().values():
            for weight in player.module.parameters():
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return Trainer(made, "distill", objective, made.plan.recipe.distill, tmp_path / "checkpoints")


def _trained(trainer: Trainer) -> list[Tensor]:
    trainer.train()
    return [weight.detach().clone() for player in trainer.players.values() for weight in player.module.parameters()]


def _close(first: list[Tensor], second: list[Tensor], tolerance: float = 2e-5) -> None:
    # Adam divides by the size of a gradient, so that rounding shows where a gradient is all but zero.
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("turns", ["joint", "alternate"])
def test_a_batch_in_parts_makes_the_step_of_the_whole(turns: str, tmp_path: Path) -> None:
    found = []
    for parts in (1, 3):
        trainer = _trainer(tmp_path / str(parts), accumulate=parts, log_every=6, optimizer={"epsilon": 1e-4})
        trainer.objective.config = type(trainer.objective.config)(turns=turns)  # type: ignore[attr-defined]
        metrics = trainer.train().metrics
        weights = [weight.detach() for player in trainer.players.values() for weight in player.module.parameters()]
        found.append((metrics, weights))
    (whole, expected), (parted, weights) = found
    assert parted == {name: pytest.approx(value, abs=1e-6) for name, value in whole.items()}
    _close(weights, expected)


def test_parts_of_unequal_size_are_weighted_by_their_size(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, accumulate=3)
    seen = []
    batch = trainer.run.assembly.data.training_batch
    trainer.run.assembly.data.training_batch = lambda draws: seen.append(draws.sample_indices.tolist()) or batch(draws)  # type: ignore[method-assign,func-returns-value]
    trainer.step = 2
    trainer._one_step()
    assert seen == [[20, 21, 22], [23, 24, 25], [26, 27, 28, 29]]


def test_more_parts_than_examples_are_refused() -> None:
    with pytest.raises(FieldError, match="accumulate: must be at most batch_size 2, got 3"):
        TrainSection(steps=1, batch_size=2, accumulate=3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_activations_computed_again_give_the_same_weights(dropout: float, tmp_path: Path) -> None:
    plain = _trained(_trainer(tmp_path / "plain", dropout=dropout))
    again = _trained(_trainer(tmp_path / "again", {"activation_checkpointing": True}, dropout=dropout))
    assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))


def test_activations_are_not_kept(tmp_path: Path) -> None:
    kept = []
    for wanted in (False, True):
        backbone = _trainer(tmp_path, {"activation_checkpointing": wanted}).players["student"].module.backbone
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, s=sizes: s.append(x.numel()) or x, lambda x: x):
            backbone.features(torch.zeros(8, 3, dtype=torch.int64), torch.rand(8), Condition())
        kept.append(sum(sizes))
    assert kept[1] < 0.6 * kept[0]


def test_a_copy_of_a_checkpointed_network_has_weights_of_its_own(tmp_path: Path) -> None:
    network = make_run(_units_recipe(tmp_path)).assembly.network()
    checkpoint_units(network)
    checkpoint_units(network)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(1.0)
    z, t = torch.zeros(2, 3, dtype=torch.int64), torch.rand(2)
    features = twin.backbone.features(z, t, Condition())
    features.sum().backward()
    assert all(weight.grad is None for weight in network.parameters())
    assert not torch.allclose(features, network.backbone.features(z, t, Condition()))
    assert twin.state_dict().keys() == network.state_dict().keys()


def _units_recipe(tmp_path: Path) -> dict[str, Any]:
    backbone = {"name": "transformer", "params": {"width": 16, "heads": 2, "depth": 2, "convolutions": 1}}
    return tiny_recipe(tmp_path, backbone=backbone)


@pytest.mark.parametrize("block_size", [None, 3])
def test_the_transformer_compiles_without_a_graph_break(block_size: int | None, tmp_path: Path) -> None:
    recipe = _units_recipe(tmp_path)
    if block_size is not None:
        recipe["backbone"]["params"]["block_size"] = block_size
        recipe["sampler"] = {"name": "block", "params": {"inner": {"name": "ancestral"}}}
        recipe["generator"]["params"]["latent"] = "position"
    backbone = make_run(recipe).assembly.backbone()
    z, t = torch.randint(3, (4, 3)), torch.rand(4)
    compiled = torch.compile(backbone.features, backend="eager", fullgraph=True)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(compiled(z, t, Condition()), backbone.features(z, t, Condition()))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of PyTorch's own tracing
def test_compiled_blocks_compute_what_plain_ones_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs alone: turning them into C++ takes longer than a test should.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    network = make_run(_units_recipe(tmp_path)).assembly.network()
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    twin = copy.deepcopy(network)
    compile_units(twin)
    assert [unit._compiled_call_impl is not None for unit in units_of(twin)] == [True, True]
    assert all(unit._compiled_call_impl is None for unit in units_of(copy.deepcopy(twin)))
    z, t = torch.zeros(2, 3, dtype=torch.int64), torch.rand(2)
    results = []
    for model in (network, twin):
        features = model.backbone.features(z, t, Condition())
        features.square().sum().backward()
        results.append([features, *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    _close(results[0], results[1], tolerance=1e-4)


def test_the_fused_optimiser_makes_the_same_steps(tmp_path: Path) -> None:
    plain = _trained(_trainer(tmp_path / "plain"))
    fused = _trainer(tmp_path / "fused", optimizer={"fused": True})
    assert all(optimizer.defaults["fused"] for optimizer in fused.optimizers.values())
    _close(_trained(fused), plain)


def test_tf32_is_set_on_cuda_alone_and_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with tf32_matrix_products(True, torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    for wanted, device in ((True, "cpu"), (False, "cuda")):
        with tf32_matrix_products(wanted, torch.device(device)):
            assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


def test_every_choice_is_at_hand_for_the_log(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["run"] |= {"activation_checkpointing": True, "tf32": True, "threads": 1}
    recipe["distill"]["accumulate"] = 2
    run = make_run(recipe)
    assert run.engine == {
        "tf32": "off", "compile": "off", "activation_checkpointing": "on", "processes": "1", "threads": "1",
        "initialize.accumulate": "1", "initialize.fused_optimizer": "off", "distill.accumulate": "2",
        "distill.fused_optimizer": "off",
    }  # fmt: skip
    assert run.choices["activation checkpointing"] == "on"
    assert "compile" not in run.choices


def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = load_plugins()
    recipe = tiny_recipe(tmp_path)
    recipe["run"]["activation_checkpointing"] = True
    mlp = registry.get("backbone", "mlp").cls
    monkeypatch.setattr(mlp, "units", lambda self: ())
    with pytest.raises(RecipeError, match=r"run\.activation_checkpointing: works on blocks, and backbone mlp names"):
        Run(resolve(recipe_from_plain(recipe, "recipe"), registry), registry)
    monkeypatch.undo()
    recipe["run"] = {**recipe["run"], "activation_checkpointing": False, "compile": True}
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match=r"run\.compile: needs a C\+\+ compiler"):
        Run(resolve(recipe_from_plain(recipe, "recipe"), registry), registry)


@pytest.mark.parametrize("name", ["mlp", "transformer", "unet", "uvit"])
def test_backbones_of_this_tree_name_their_blocks(name: str) -> None:
    registry = load_plugins()
    assert "units" in vars(registry.get("backbone", name).cls)
