"""All distillation objectives on two tied coins, whose best product distribution is at total variation sqrt(2) - 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import make_run, tiny_recipe

from dmmd_core.errors import RecipeError

BOUND = 2**0.5 - 1
OBJECTIVES: dict[str, dict[str, Any]] = {
    "moment_matching": {"auxiliary_target": "soft", "auxiliary_learning_rate_scale": 3.0},
    "sdtt": {"rounds": 2},
    "dimo": {},
    "idlm": {},
    "dcd": {"rounds": 2},
}
NOISY = {"name": "noise_conditioned", "params": {"latent": "position", "width": 16, "initial_scale": 3.0}}


def _one_step(tmp_path: Path, objective: str, params: dict[str, Any], generator: dict[str, Any], steps: int) -> float:
    """Total variation of a student's single step after a short training."""
    recipe = tiny_recipe(
        tmp_path,
        data={"name": "tied_coins"},
        backbone={"name": "mlp", "params": {"width": 64, "depth": 2}},
        objective={"name": objective, "params": params},
        generator=generator,
    )
    train = {"batch_size": 64, "ema": 0.9, "log_every": 1000, "checkpoint_every": 1000}
    optimizer = {"learning_rate": 2e-3, "beta1": 0.0}
    recipe["distill"] = {
        "num_steps": 1, "steps": steps, **train, "optimizer": optimizer,
        "initialize": {**recipe["distill"]["initialize"], "steps": 150, **train},
    }  # fmt: skip
    metric = {"name": "total_variation", "params": {"num_samples": 4000}}
    recipe["evaluate"] = {"teacher_steps": [], "student_steps": [1], "num_samples": 20, "metrics": [metric]}
    run = make_run(recipe)
    run.execute()
    (value,) = (row["value"] for row in run.metrics["results"] if row["model"] == "student")
    return float(value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_factorised_student_without_latent_passes_the_product_bound_in_one_step(
    objective: str, tmp_path: Path
) -> None:
    value = _one_step(tmp_path, objective, OBJECTIVES[objective], {"name": "deterministic"}, 60)
    # Exact, by enumeration of the one step: no room but that of float32 weights.
    assert value >= BOUND - 1e-6


def test_dmmd_passes_the_product_bound_in_one_step(tmp_path: Path) -> None:
    value = _one_step(tmp_path, "moment_matching", OBJECTIVES["moment_matching"], NOISY, 400)
    # 4,000 averaged last steps: standard error of a total variation of four outcomes below 0.01; five of them.
    assert value < BOUND - 0.05


def test_a_mixture_without_latent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs capability 'latent' to train a mixture"):
        _one_step(tmp_path, "di4c", {}, {"name": "deterministic"}, 2)


def test_one_step_methods_refuse_more_steps(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, objective={"name": "dimo"})
    with pytest.raises(RecipeError, match=r"distill.num_steps: must be 1 for objective 'dimo'.*got 2"):
        make_run(recipe)
