"""Block-autoregressive networks: what sees what, cached against uncached, training to samples of any length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_recipe
from torch import Tensor

from dmmd_backbones.attention import choose_attention
from dmmd_backbones.mlp import MLP
from dmmd_backbones.transformer import Transformer
from dmmd_core import (
    Condition,
    Denoiser,
    Draws,
    FieldError,
    NetworkDenoiser,
    Prediction,
    RecipeError,
    Run,
    UnsupportedError,
    load_plugins,
    load_recipe,
    load_student,
    load_teacher,
)
from dmmd_core.resolve import resolve
from dmmd_core.saved import recipe_from_plain
from dmmd_core.smoke import smoke_settings
from dmmd_generators.noise_conditioned import NoiseConditioned
from dmmd_processes.masked import Masked
from dmmd_processes.schedules import Linear
from dmmd_samplers.ancestral import Ancestral
from dmmd_samplers.block import Block

INPUTS, VOCAB, LENGTH, SIZE, BATCH = 7, 6, 12, 3, 4
PROCESS = Masked(Masked.Config(), vocab_size=VOCAB, schedule=Linear(Linear.Config()))
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "rotary": {},
    "learned": {"positions": "learned"},
    "convolutions": {"convolutions": 2},
    "classes": {"class_conditional": True},
}


def _transformer(**params: Any) -> Transformer:
    torch.manual_seed(0)
    config = Transformer.Config(**{"width": 16, "heads": 2, "depth": 3, "block_size": SIZE, **params})
    model = Transformer(config, num_inputs=INPUTS, vocab_size=VOCAB, length=LENGTH, grid=None, num_classes=3)
    with torch.no_grad():  # zero-initialised gates and heads would hide everything
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Clean tokens, noisy tokens, times per position and labels."""
    draws = Draws.for_range(0, 0, 0, BATCH)
    clean = draws.integers("x", VOCAB, (LENGTH,))
    t = draws.uniform("t", (LENGTH // SIZE,)).repeat_interleave(SIZE, dim=1)
    return clean, PROCESS.corrupt(clean, t, draws), t, draws.integers("label", 3)


def _log_probs(denoiser: Denoiser, z: Tensor, t: Tensor, latent: Tensor | None = None, **told: Any) -> Tensor:
    return denoiser(z, t, Condition(**told), latent).log_probs().unflatten(0, z.shape).detach()


def _blockwise(denoiser: Denoiser, latent: Tensor | None = None, *, cached: bool) -> Tensor:
    """Predictions block after block; the context grows, or all finished blocks are encoded anew each time."""
    clean, z, t, label = _inputs()
    found, context = [], None
    for start in range(0, LENGTH, SIZE):
        part = slice(start, start + SIZE)
        if start and not cached:
            context = denoiser.encode(clean[:, :start], Condition(label=label))
        noise = None if latent is None else latent[:, part]
        found.append(_log_probs(denoiser, z[:, part], t[:, part], noise, label=label, context=context))
        if cached:
            context = denoiser.encode(clean[:, part], Condition(label=label, context=context))
    return torch.cat(found, dim=1)


# ---- cached, uncached, all at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_cached_uncached_and_all_blocks_at_once_agree(name: str) -> None:
    denoiser = NetworkDenoiser(_transformer(**TRANSFORMERS[name]), PROCESS)
    clean, z, t, label = _inputs()
    together = _log_probs(denoiser, z, t, label=label, clean=clean)
    masked = z == VOCAB
    assert float(together[masked].std(0).min()) > 0.05, "predictions differ, so that agreement means something"
    for cached in (True, False):
        difference = (_blockwise(denoiser, cached=cached) - together)[masked]
        assert float(difference.abs().max()) < 1e-5


@pytest.mark.parametrize("latent", ["sequence", "position"])
def test_students_agree_as_well_each_block_with_its_part_of_the_latent(latent: str) -> None:
    config = NoiseConditioned.Config(latent=latent, width=5)  # type: ignore[arg-type]
    student = NoiseConditioned(config, backbone=_transformer(), process=PROCESS, length=LENGTH, grid=None)
    clean, z, t, label = _inputs()
    noise = student.draw_latent(Draws.for_range(0, 0, 0, BATCH))
    assert noise.shape == (BATCH, LENGTH, 5)
    together = _log_probs(student, z, t, noise, label=label, clean=clean)
    for cached in (True, False):
        difference = (_blockwise(student, noise, cached=cached) - together)[z == VOCAB]
        assert float(difference.abs().max()) < 1e-5
    other = _log_probs(student, z, t, noise.roll(1, 0), label=label, clean=clean)
    assert float((other - together)[z == VOCAB].abs().max()) > 1e-2


class _Uncached(Denoiser):
    """A denoiser whose context is tokens, encoded anew at every call."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__()
        self.inner = inner
        self.block_size = inner.block_size

    def encode(self, tokens: Tensor, condition: Condition | None = None) -> object:
        before = condition and condition.context
        return tokens if before is None else torch.cat((before, tokens), dim=1)

    def forward(
        self, z_t: Tensor, t: Tensor, condition: Condition | None = None, latent: Tensor | None = None
    ) -> Prediction:
        assert condition is not None
        tokens = condition.context
        context = None if tokens is None else self.inner.encode(tokens, Condition(label=condition.label))
        told = Condition(condition.label, condition.fixed, condition.values, context)
        return self.inner(z_t, t, told, latent)


@pytest.mark.parametrize("length", [LENGTH, 20])
def test_samples_are_those_without_a_cache_whatever_the_batch_split(length: int) -> None:
    denoiser = NetworkDenoiser(_transformer(convolutions=1), PROCESS)
    inner = Ancestral(Ancestral.Config(), process=PROCESS, length=LENGTH)
    sampler = Block(Block.Config(), inner=inner, process=PROCESS, length=LENGTH)
    cached, uncached = (
        sampler.sample(one, Draws.for_range(0, 0, 0, 16), num_steps=3, length=length).tokens
        for one in (denoiser, _Uncached(denoiser))
    )
    assert cached.shape == (16, length)
    assert torch.equal(cached, uncached)
    part = sampler.sample(denoiser, Draws.for_range(0, 0, 5, 4), num_steps=3, length=length).tokens
    assert torch.equal(part, cached[5:9])


def test_a_context_of_one_sample_serves_a_batch() -> None:
    denoiser = NetworkDenoiser(_transformer(), PROCESS)
    clean, z, t, _ = _inputs()
    one = denoiser.encode(clean[:1, :SIZE])
    many = denoiser.encode(clean[:1, :SIZE].expand(BATCH, -1))
    first, second = (_log_probs(denoiser, z[:, :SIZE], t[:, :SIZE], context=context) for context in (one, many))
    assert float((first - second)[z[:, :SIZE] == VOCAB].abs().max()) < 1e-5


# ---- what sees what ------------------------------------------------------------------------------------------------


def _changed(before: Tensor, after: Tensor) -> list[int]:
    """Blocks in which features differ anywhere."""
    differs = (before - after).abs().amax((0, 2)).unflatten(0, (-1, SIZE)).amax(-1) > 1e-4
    return [int(block) for block in differs.nonzero()]


@pytest.mark.parametrize("name", TRANSFORMERS)
@pytest.mark.parametrize("position", range(LENGTH))
def test_a_token_reaches_its_block_if_noisy_and_later_blocks_if_clean(name: str, position: int) -> None:
    model = _transformer(**TRANSFORMERS[name])
    clean, z, t, label = _inputs()
    before = model.features(z, t, Condition(label=label, clean=clean))
    block = position // SIZE
    other = clean.clone()
    other[:, position] = (clean[:, position] + 1) % VOCAB
    after = model.features(z, t, Condition(label=label, clean=other))
    assert _changed(before, after) == list(range(block + 1, LENGTH // SIZE))
    noisy = z.clone()
    noisy[:, position] = (z[:, position] + 1) % INPUTS
    after = model.features(noisy, t, Condition(label=label, clean=clean))
    assert _changed(before, after) == [block]
    later = t.clone()
    later[:, position] = 1 - t[:, position]
    after = model.features(z, later, Condition(label=label, clean=clean))
    assert _changed(before, after) == [block]


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_no_gradient_flows_where_nothing_may_be_seen(name: str) -> None:
    model = _transformer(**TRANSFORMERS[name])
    clean, z, t, label = _inputs()
    embedded: list[Tensor] = []
    model.tokens.register_forward_hook(lambda module, given, out: embedded.append(out))
    features = model.features(z, t, Condition(label=label, clean=clean))
    of_clean, of_noisy = embedded  # the encoder runs first
    for block in range(LENGTH // SIZE):
        part = features[:, block * SIZE : (block + 1) * SIZE].square().sum()
        gradients = torch.autograd.grad(part, (of_clean, of_noisy), retain_graph=True, allow_unused=True)
        reached = [
            set() if gradient is None else {int(p) // SIZE for p in gradient.abs().amax((0, 2)).nonzero()}
            for gradient in gradients
        ]
        assert reached == [set(range(block)), {block}]


def test_every_weight_is_trained_through_both_streams() -> None:
    model = _transformer(convolutions=1, class_conditional=True)
    clean, z, t, label = _inputs()
    features = model.features(z, t, Condition(label=label, clean=clean))
    model.head(features.flatten(0, 1)).square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


# ---- sizes and refusals --------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit_are_refused() -> None:
    for params, told in (
        ({"block_size": 5}, "must divide the data's length 12, got 5"),
        ({"layout": "grid"}, "must be line with block_size"),
        ({"attention": "xformers"}, "must be auto or sdpa with block_size"),
    ):
        with pytest.raises(FieldError, match=told):
            _transformer(**params)
    model = _transformer(positions="learned")
    clean, z, t, _ = _inputs()
    with pytest.raises(ValueError, match="a block has 3 tokens, got 12"):
        model.features(z, t, Condition())
    with pytest.raises(ValueError, match="only whole blocks of 3 tokens can be encoded, got 4"):
        model.encode(clean[:, :4], Condition())
    whole = model.encode(clean, Condition())
    with pytest.raises(ValueError, match=r"leave condition\.context out"):
        model.features(z, t, Condition(clean=clean, context=whole))
    with pytest.raises(UnsupportedError, match="learned positions end at 12, got 15"):
        model.features(z[:, :SIZE], t[:, :SIZE], Condition(context=whole))
    mlp = MLP(MLP.Config(), num_inputs=INPUTS, vocab_size=VOCAB, length=LENGTH)
    for one in (mlp, _transformer(block_size=None)):
        with pytest.raises(UnsupportedError, match="whole sequences"):
            NetworkDenoiser(one, PROCESS).encode(clean)


def test_blocks_are_attended_by_sdpa_and_that_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("dmmd_backbones.attention.xformers_problem", lambda head_width: None)
    assert choose_attention("auto")[0] == "xformers on CUDA"
    assert choose_attention("auto", masked=True)[0] == "sdpa"
    assert _transformer().description() == {"attention": "sdpa", "block_size": "3"}


def _recipe(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    blocks = {"name": "transformer", "params": {"width": 8, "heads": 1, "depth": 1, "block_size": 1}}
    return tiny_recipe(tmp_path, **{"backbone": blocks, "sampler": {"name": "block"}, **sections})


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"sampler": {"name": "ancestral"}}, "'blocks' to draw block by block, which sampler 'ancestral'"),
        ({"backbone": {"name": "mlp"}}, "'blocks' to predict one block .* which backbone 'mlp'"),
        (
            {"generator": {"name": "noise_conditioned", "params": {"latent": "pyramid"}}},
            "'blocks' to have input noise for a block, which generator 'noise_conditioned'",
        ),
        (
            {"evaluate": {"teacher_steps": [1], "teacher_sampler": {"name": "ancestral"}}},
            "'blocks' to draw block by block, which sampler 'ancestral'",
        ),
    ],
    ids=["sampler", "backbone", "generator", "teacher_sampler"],
)
def test_parts_that_know_no_blocks_are_refused_beside_those_that_do(
    tmp_path: Path, sections: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        resolve(recipe_from_plain(_recipe(tmp_path, **sections), "recipe"), load_plugins())


def test_objectives_and_teachers_that_know_no_blocks_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = load_plugins()
    recipe = recipe_from_plain(_recipe(tmp_path), "recipe")
    resolve(recipe, registry)
    monkeypatch.setattr(registry.get("objective", "denoising").cls, "provides", lambda config: {"initializes"})
    monkeypatch.setattr(registry.get("teacher", "exact").cls, "provides", lambda config: frozenset())
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, registry)
    told = str(caught.value)
    assert "'blocks' to train on all blocks at once, which objective 'denoising'" in told
    assert "'blocks' to predict one block given those before it, which teacher 'exact'" in told


def test_a_teacher_of_another_run_has_the_blocks_of_the_recipes_backbone(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path, teacher={"load": {"name": "from_run", "params": {"path": "runs/other"}}})
    del recipe["distill"]["initialize"]
    resolve(recipe_from_plain(recipe, "recipe"), load_plugins(), outside=False)


def test_bfloat16_trains_and_samples_blocks(tmp_path: Path) -> None:
    recipe = _recipe(tmp_path)
    recipe["run"]["precision"] = "bfloat16"
    run = Run(resolve(recipe_from_plain(recipe, "recipe"), load_plugins()), load_plugins())
    run.execute()
    samples = run.samples("student", 2)
    assert samples is not None
    assert samples.tokens.shape == (20, 3)


@pytest.mark.parametrize(("size", "smaller"), [(16, 8), (12, 4), (25, 1), (4, 4)])
def test_smoke_blocks_divide_shortened_sequences(tmp_path: Path, size: int, smaller: int) -> None:
    recipe = _recipe(tmp_path)
    recipe["backbone"]["params"]["block_size"] = size
    settings = dict(smoke_settings(resolve(recipe_from_plain(recipe, "recipe"), load_plugins()), []))
    assert settings.get("backbone.params.block_size", size) == smaller


# ---- end to end ----------------------------------------------------------------------------------------------------


def test_training_on_data_and_distilling_improve_on_the_teachers_single_step(tmp_path: Path) -> None:
    """Four tied coins in blocks of two: one step a block has TV 1/2 at best, and a student with input noise less."""
    train = {"batch_size": 96, "log_every": 100}
    fast = {"learning_rate": 3e-3, "decay": "linear"}
    recipe = _recipe(
        tmp_path,
        data={"name": "tied_coins", "params": {"coins": 4}},
        backbone={
            "name": "transformer",
            "params": {"width": 32, "heads": 2, "depth": 1, "positions": "learned", "block_size": 2},
        },
        teacher={"objective": {"name": "denoising"}, "train": {"steps": 120, "optimizer": fast, **train}},
        generator={"name": "noise_conditioned", "params": {"latent": "sequence", "width": 8, "initial_scale": 3}},
        objective={
            "name": "moment_matching",
            "params": {"auxiliary_target": "soft", "auxiliary_learning_rate_scale": 3},
        },
        distill={
            "num_steps": 1,
            "steps": 150,
            "ema": 0.95,
            "optimizer": {"learning_rate": 1e-3, "beta1": 0.0, "clip_norm": None, "decay": "linear"},
            **train,
        },
        evaluate={
            "teacher_steps": [1, 4],
            "student_steps": [1],
            "num_samples": 20,
            "metrics": [{"name": "total_variation", "params": {"num_samples": 3000}}],
        },
    )
    run = Run(resolve(recipe_from_plain(recipe, "recipe"), load_plugins()), load_plugins())
    run.execute()
    results = json.loads((run.directory / "metrics.json").read_text())["results"]
    distances = {(row["model"], row["num_steps"]): row["value"] for row in results}
    assert distances["teacher", 1] > 0.45
    assert distances["teacher", 4] == pytest.approx(0.125, abs=0.06)
    assert distances["student", 1] < 0.3


RECIPE = """
schema: 1
name: tiny_blocks
data: {name: text, params: {files: [FILE], length: 24, held_out: 0.2, tokenizer: {name: byte}}}
process: {name: masked}
backbone: {name: transformer, params: {width: 16, depth: 1, heads: 2, convolutions: 1, positions: POSITIONS, block_size: 8}}
teacher: {objective: {name: denoising}, train: {steps: 3, batch_size: 8}}
generator: {name: noise_conditioned, params: {width: 4}}
objective: {name: moment_matching, params: {top_p: 0.9, chunk_rows: 16}}
distill: {num_steps: 2, steps: 3, batch_size: 8}
sampler: {name: block, params: {inner: {name: ancestral, params: {chunk_rows: 16}}}}
evaluate: {teacher_steps: [2], student_steps: [2], num_samples: 8, metrics: [{name: token_entropy}]}
run: {directory: RUN}
"""  # noqa: E501


def _command(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from dmmd_core.cli import {module}; sys.exit({module}())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def _text_recipe(tmp_path: Path, positions: str) -> Path:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"line {number} of a short text\n" for number in range(200)))
    recipe = tmp_path / "recipe.yaml"
    content = RECIPE.replace("FILE", str(corpus)).replace("RUN", str(tmp_path / "run"))
    recipe.write_text(content.replace("POSITIONS", positions))
    return recipe


def test_from_a_recipe_to_samples_with_a_prompt_and_of_any_length(tmp_path: Path) -> None:
    recipe, run, out = _text_recipe(tmp_path, "rotary"), tmp_path / "run", tmp_path / "out"
    checked = _command("run_command", recipe, "--check")
    assert checked.returncode == 0, checked.stderr
    assert "block_size 8" in checked.stdout
    done = _command("run_command", recipe)
    assert done.returncode == 0, done.stderr
    told = ["--prompt", "line 7", "--suffix", "text", "--length", "45", "--num", "3"]
    done = _command("sample_command", run, *told, "--out", out)
    assert done.returncode == 0, done.stderr
    student = load_student(run)
    assert student.any_length
    template = student.text_template("line 7", "text", length=45)
    tokens = student.sample(3, template=template, length=45)
    assert tokens.shape == (3, 45)
    decoded = student.codec.decode(tokens)
    assert all(text.startswith("line 7") and text.endswith("text") for text in decoded)
    (written,) = out.glob("*.txt")
    assert written.read_text().count("line 7") >= 3
    infill = torch.full((45,), -1)
    infill[20:30] = 65
    assert bool((student.sample(2, template=infill, length=45)[:, 20:30] == 65).all())
    longer = student.sample(5, length=50, batch_size=2)
    assert torch.equal(longer[:, :31], student.sample(5, length=31)), "what comes later changes nothing before"
    assert torch.equal(longer[:, :24], student.sample(5))
    assert load_teacher(run).sample(2, steps=1, length=40).shape == (2, 40)


def test_lengths_that_a_model_cannot_draw_are_refused(tmp_path: Path) -> None:
    run, registry = tmp_path / "run", load_plugins()
    Run(resolve(load_recipe(_text_recipe(tmp_path, "learned")), registry), registry).execute()
    refused = _command("sample_command", run, "--length", "25", "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert "knows positions up to 24, got length 25" in refused.stderr
    student = load_student(run)
    assert student.sample(2, length=10).shape == (2, 10)
    with pytest.raises(ValueError, match=r"of shape \[10\] or \[2, 10\]"):
        student.sample(2, template=torch.full((24,), -1), length=10)
    with pytest.raises(ValueError, match="at least 1, got -3"):
        student.sample(2, length=-3)
    with pytest.raises(ValueError, match="leave nothing of 4 to fill in"):
        student.text_template("too long", length=4)


def test_models_of_whole_sequences_have_one_length(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    run = Run(resolve(recipe_from_plain(recipe, "recipe"), load_plugins()), load_plugins())
    run.execute()
    student = load_student(run.directory)
    assert student.sample(2, length=3).shape == (2, 3)
    with pytest.raises(ValueError, match="draws whole sequences of 3 tokens, got length 4"):
        student.sample(2, length=4)
