"""Guidance by labels of a model with blocks, as a user meets it: in a run, from the command line, at other lengths."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_recipe, write_recipe

from dmmd_core import RecipeError, load_plugins, load_teacher
from dmmd_core.cli import run_command, sample_command
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain

TRAIN = {"steps": 3, "batch_size": 8, "log_every": 1}
# Long and fast enough that labels matter: gates that listen to them start at zero.
FAST = {"steps": 12, "batch_size": 8, "ema": 0.0, "optimizer": {"learning_rate": 0.05}}


def _block(**params: Any) -> dict[str, Any]:
    return {"name": "block", "params": {"inner": {"name": "ancestral", "params": params}}}


def _recipe(folder: Path, **sections: Any) -> dict[str, Any]:
    codec = {"name": "kmeans_patches", "params": {"codes": 16}}
    params = {"width": 16, "depth": 1, "heads": 2, "class_conditional": True, "block_size": 4}
    given: dict[str, Any] = {
        "data": {"name": "digits", "params": {"codec": codec}},
        "backbone": {"name": "transformer", "params": params},
        "teacher": {"objective": {"name": "denoising", "params": {"label_dropout": 0.2}}, "train": FAST},
        "objective": {"name": "moment_matching", "params": {"guidance": 2.0}},
        "distill": {"num_steps": 2, **TRAIN},
        "sampler": {"name": "block"},
    }
    recipe = tiny_recipe(folder, **given)
    recipe["evaluate"]["teacher_sampler"] = _block(guidance=2.0)
    recipe["evaluate"]["metrics"] = []
    return {**recipe, **sections}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guided_blocks")
    assert run_command([str(write_recipe(folder, _recipe(folder)))]) == 0
    return folder / "run"


def test_a_teacher_with_blocks_is_guided_from_the_command_line(run: Path, tmp_path: Path) -> None:
    def sample(*arguments: str) -> np.ndarray:
        out = tmp_path / "_".join(arguments or ("none",))
        words = [str(run), "--model", "teacher", "--steps", "2", "--num", "40", "--label", "3", "--out", str(out)]
        assert sample_command([*words, *arguments]) == 0
        return np.load(next(out.glob("*.npy")))

    drawn = {scale: sample("--guidance", scale) for scale in ("1", "2", "40")}
    assert (sample() == drawn["2"]).all(), "without the option the recipe's sampler guides"
    assert (drawn["1"] != drawn["2"]).any()
    assert (drawn["2"] != drawn["40"]).any()
    both = sample("--guidance", "40", "--length", "16")
    assert (both == drawn["40"]).all()


def test_guidance_and_a_length_go_together(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(run), "--model", "teacher", "--steps", "2", "--guidance", "2", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert sample_command([*words, "--length", "24"]) == 2
    assert "draws whole grids of 16 tokens" in capsys.readouterr().err
    model = load_teacher(run)
    line = dataclasses.replace(model, spec=dataclasses.replace(model.spec, grid=None))  # tokens that make no image
    longer, plain = (line.sample(20, steps=2, label=3, length=24, guidance=scale) for scale in (40.0, 1.0))
    assert longer.shape == (20, 24)
    assert torch.equal(longer[:, :16], model.sample(20, steps=2, label=3, guidance=40.0))
    assert bool((longer[:, 16:] != plain[:, 16:]).any())
    template = torch.full((24,), -1)
    template[18:20] = 5
    given = line.sample(20, steps=2, label=3, length=24, guidance=40.0, template=template)
    assert bool((given[:, 18:20] == 5).all())
    assert torch.equal(given[:, :16], longer[:, :16])


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"sampler": _block(guidance=2.0)}, "never guided"),
        (
            {"teacher": {"objective": {"name": "denoising"}, "train": TRAIN}},
            r"teacher_sampler\.params\.inner\.params\.guidance: .*'unlabelled'",
        ),
        (
            {"evaluate": {"teacher_steps": [1], "teacher_sampler": {"name": "ancestral"}}},
            "'blocks' to draw block by block, which sampler 'ancestral'",
        ),
        (
            {"backbone": {"name": "uvit", "params": {"class_conditional": True}}},
            "'blocks' to predict one block .* which backbone 'uvit'",
        ),
        (
            {"backbone": {"name": "unet", "params": {"class_conditional": True}}},
            "'blocks' to predict one block .* which backbone 'unet'",
        ),
    ],
    ids=["student", "label_dropout", "whole_sequences", "uvit", "unet"],
)
def test_what_does_not_fit_is_refused_where_it_is_asked_for(
    tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    registry = load_plugins()
    resolve(recipe_from_plain(_recipe(tmp_path), "recipe"), registry)
    with pytest.raises(RecipeError, match=told):
        resolve(recipe_from_plain(_recipe(tmp_path, **sections), "recipe"), registry)
