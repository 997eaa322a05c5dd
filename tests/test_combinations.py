"""Swapping one component needs no other change: every combination runs at smoke size or is refused by declaration."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_recipe

from dmmd_core import Registry, load_plugins, load_student
from dmmd_core.errors import RecipeError
from dmmd_core.pipeline import Run
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain

TRAIN = {"steps": 2, "batch_size": 4, "log_every": 1}
INITIALIZE = {"objective": {"name": "denoising", "params": {"target": "teacher"}}, **TRAIN}
TRAINED = {"objective": {"name": "denoising"}, "train": TRAIN}

AXES: dict[str, dict[str, dict[str, Any]]] = {
    "data": {
        "tied_coins": {"name": "tied_coins"},
        "markov_chain": {"name": "markov_chain", "params": {"letters": 3, "length": 4}},
        "mixture": {"name": "mixture", "params": {"length": 4}},
        "text": {"name": "text", "params": {"length": 6, "tokenizer": {"name": "byte"}}},
        "digits_vq": {"name": "digits", "params": {"codec": {"name": "kmeans_patches", "params": {"codes": 8}}}},
        "digits_pixels": {"name": "digits", "params": {"codec": {"name": "pixels"}}},
        "image_pixels": {
            "name": "image_pixels",
            "params": {
                "source": {"name": "shapes", "params": {"height": 4, "width": 4, "train": 12, "test": 4}},
                "codec": {"name": "pixels", "params": {"levels": 256, "height": 4, "width": 4, "channels": 3}},
                "flips": True,
            },
        },
        "image_vq_tokens": {
            "name": "vq_tokens",
            "params": {
                "source": {"name": "shapes", "params": {"height": 8, "width": 8, "train": 12, "test": 4}},
                "tokenizer": {
                    "name": "vq_autoencoder",
                    "params": {"codes": 8, "height": 8, "width": 8, "base_channels": 4, "steps": 2, "batch_size": 4},
                },
            },
        },
    },
    "process": {
        "masked": {"name": "masked"},
        "masked_elbo": {"name": "masked", "params": {"weight": "elbo", "schedule": {"name": "cosine"}}},
        "uniform": {"name": "uniform", "params": {"schedule": {"name": "polynomial"}}},
        "uniform_elbo": {
            "name": "uniform",
            "params": {"loss": "posterior_kl", "weight": "elbo", "parametrization": "leave_one_out"},
        },
    },
    "backbone": {
        "mlp": {"name": "mlp", "params": {"width": 8, "depth": 1, "embedding_width": 4}},
        "transformer": {"name": "transformer", "params": {"width": 8, "depth": 1, "heads": 1}},
        "transformer_grid": {
            "name": "transformer",
            "params": {"width": 8, "depth": 1, "heads": 1, "layout": "grid", "positions": "learned"},
        },
        "transformer_classes": {
            "name": "transformer",
            "params": {"width": 8, "depth": 1, "heads": 1, "class_conditional": True},
        },
        "transformer_blocks": {
            "name": "transformer",
            "params": {"width": 8, "depth": 1, "heads": 1, "block_size": 2, "convolutions": 1},
        },
        "unet": {"name": "unet", "params": {"width": 4, "multipliers": [1, 2], "blocks": 1, "head_width": 8}},
        "uvit": {
            "name": "uvit",
            "params": {"width": 8, "depth": 2, "heads": 1, "embedding_width": 4, "class_conditional": True},
        },
    },
    "generator": {
        "deterministic": {"name": "deterministic"},
        "sequence": {"name": "noise_conditioned", "params": {"latent": "sequence", "width": 2}},
        "position": {"name": "noise_conditioned", "params": {"latent": "position", "width": 2}},
        "pyramid": {"name": "noise_conditioned", "params": {"latent": "pyramid", "width": 2}},
        "partly_random": {"name": "partly_random", "params": {"width": 2}},
    },
    "objective": {
        "hard": {"name": "moment_matching"},
        "soft_on_grid": {
            "name": "moment_matching",
            "params": {"auxiliary_target": "soft", "turns": "alternate", "times": "grid"},
        },
        "posterior_shaped": {
            "name": "moment_matching",
            "params": {"auxiliary_target": "posterior", "temperature": 0.8, "top_p": 0.9, "chunk_rows": 5},
        },
    },
    "teacher": {"trained": {}, "exact": {}},
}
BASE = {
    "data": "markov_chain", "process": "masked", "backbone": "mlp", "generator": "sequence", "objective": "hard",
    "teacher": "trained",
}  # fmt: skip
# Objectives beside D-MMD, each with a few choices instead of all.
OTHERS: dict[str, dict[str, Any]] = {
    "sdtt": {"rounds": 2, "chunk_rows": 5},
    "dimo": {"chunk_rows": 5},
    "idlm": {"turns": "joint", "chunk_rows": 5},
    "di4c": {"latents": 2},
    "dcd": {"rounds": 2, "chunk_rows": 5},
}
AXES["objective"] |= {name: {"name": name, "params": params} for name, params in OTHERS.items()}
FEW = [
    {"process": "masked_elbo"}, {"process": "uniform_elbo"}, {"backbone": "transformer_blocks"},
    {"generator": "deterministic"}, {"teacher": "exact"},
    {"data": "image_pixels", "backbone": "uvit"},
]  # fmt: skip


def _refused(choice: dict[str, str]) -> bool:
    """The refusals, in words: all that cannot be combined, and nothing else."""
    images = choice["data"].startswith(("digits", "image"))
    return (
        (choice["teacher"] == "exact" and (images or choice["data"] == "text"))  # too many sequences to sum over
        or (choice["backbone"] not in ("mlp", "transformer", "transformer_blocks") and not images)  # no grid, no labels
        or (choice["generator"] == "pyramid" and not images)  # no grid
        or (choice["generator"] == "partly_random" and choice["process"].startswith("uniform"))  # no masks
        or (choice["generator"] == "pyramid" and choice["backbone"] == "transformer_blocks")  # spans the whole grid
        or (choice["objective"] == "soft_on_grid" and choice["process"].startswith("uniform"))  # not exact there
        or (choice["objective"] in ("sdtt", "dimo", "idlm") and choice["process"].startswith("uniform"))  # no masks
        or (choice["objective"] in ("dimo", "idlm", "di4c") and choice["backbone"] == "transformer_blocks")
        or (choice["objective"] == "di4c" and choice["generator"] == "deterministic")  # a mixture of one
    )


def _combinations() -> list[dict[str, str]]:
    """All choices of all pairs of axes, the other axes at their first fitting choice."""
    found = {}
    for first, second in itertools.combinations(AXES, 2):
        for one, two in itertools.product(AXES[first], AXES[second]):
            choice = {**BASE, first: one, second: two}
            if choice["objective"] not in OTHERS:
                found[tuple(choice.values())] = choice
    return [*found.values(), *({**BASE, "objective": name, **more} for name in OTHERS for more in FEW)]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return load_plugins()


@pytest.mark.parametrize("choice", _combinations(), ids=lambda choice: "-".join(choice.values()))
def test_every_pair_of_components_runs_or_is_refused(
    choice: dict[str, str], registry: Registry, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {axis: AXES[axis][name] for axis, name in choice.items() if axis != "teacher"}
    exact = choice["teacher"] == "exact"
    sections["teacher"] = {"load": {"name": "exact"}} if exact else TRAINED
    steps = 1 if choice["objective"] == "dimo" else 2
    sections["distill"] = {"num_steps": steps, **TRAIN, **({"initialize": INITIALIZE} if exact else {})}
    sections["sampler"] = {"name": "block" if choice["backbone"] == "transformer_blocks" else "ancestral"}
    sections["evaluate"] = {"teacher_steps": [1], "student_steps": [2], "num_samples": 4, "metrics": []}
    recipe = recipe_from_plain(tiny_recipe(tmp_path, **sections), "recipe")
    if _refused(choice):
        with pytest.raises(RecipeError, match="needs capability"):
            resolve(recipe, registry)
        return
    run = Run(resolve(recipe, registry), registry)
    run.execute()
    samples = run.samples("student", 2)
    assert samples is not None
    assert run.assembly.spec is not None
    assert samples.tokens.shape == (4, run.assembly.spec.length)
    assert 0 <= int(samples.tokens.min()) <= int(samples.tokens.max()) < run.assembly.spec.vocab_size


def test_a_run_samples_by_confidence(registry: Registry, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, sampler={"name": "confidence"})
    run = Run(resolve(recipe_from_plain(recipe, "recipe"), registry), registry)
    run.execute()
    for model, steps in (("teacher", 1), ("student", 2)):
        samples = run.samples(model, steps)
        assert samples is not None
        assert int(samples.tokens.max()) < 3, "nothing stays masked"
    assert {row["sampler"] for row in run.metrics["results"] if row["num_steps"]} == {"confidence"}


def test_a_run_samples_its_blocks_by_confidence(registry: Registry, tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "data": AXES["data"]["text"],
        "backbone": AXES["backbone"]["transformer_blocks"],
        "teacher": TRAINED,
        "distill": {"num_steps": 2, **TRAIN},
        "sampler": {"name": "block", "params": {"inner": {"name": "confidence"}}},
        "evaluate": {"teacher_steps": [1], "student_steps": [2], "num_samples": 4, "metrics": []},
    }
    run = Run(resolve(recipe_from_plain(tiny_recipe(tmp_path, **sections), "recipe"), registry), registry)
    run.execute()
    assert run.assembly.spec is not None
    for model, steps in (("teacher", 1), ("student", 2)):
        samples = run.samples(model, steps)
        assert samples is not None
        assert int(samples.tokens.max()) < run.assembly.spec.vocab_size, "nothing stays masked"
    student = load_student(run.directory)
    assert torch.equal(student.sample(3, length=11)[:, :6], student.sample(3))
    assert student.sample(3, length=5).shape == (3, 5)


def test_the_axes_name_every_component_in_the_tree(registry: Registry) -> None:
    for kind in ("data", "process", "backbone", "generator", "teacher"):
        used = {choice["name"] for choice in AXES[kind].values() if "name" in choice}
        used |= {"exact", "from_run", "transformers_masked"}
        assert set(registry.names(kind)) <= used, f"add the new {kind} to AXES"
