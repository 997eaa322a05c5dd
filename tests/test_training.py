"""The loop: modes, players, moving average, learning rate, and small runs whose figures move the right way."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import RECIPES, make_run, make_trainer, tiny_recipe
from torch import nn

from dmmd_core import RunError, load_plugins
from dmmd_core.checkpoint import load_tensors
from dmmd_core.ema import MovingAverage
from dmmd_core.errors import Interrupted
from dmmd_core.optim import learning_rate
from dmmd_core.pipeline import Run
from dmmd_core.recipe import OptimizerSection, load_recipe
from dmmd_core.resolve import resolve
from dmmd_core.usage import StepTimes, peak_memory


def test_the_frozen_teacher_is_in_evaluation_mode_without_gradients(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path)
    teacher = trainer.objective.frozen()["teacher"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer.train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert all(player.module.training for player in trainer.players.values())


def test_both_players_move_and_the_result_is_averaged(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path, ema=0.5)
    before = {
        name: [parameter.clone() for parameter in player.module.parameters()]
        for name, player in trainer.players.items()
    }
    trained = trainer.train()
    for name, player in trainer.players.items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], player.module.parameters(), strict=True)]
        assert any(moved), name
    student = trainer.players["student"].module
    assert trained.model is not student
    assert any(not torch.equal(a, b) for a, b in zip(trained.model.parameters(), student.parameters(), strict=True))


def test_a_log_line_tells_throughput_and_the_wait_for_data(tmp_path: Path) -> None:
    run, trainer = make_trainer(tmp_path, steps=4, log_every=2)
    told: list[dict[str, float]] = []
    run.after_step = lambda step, metrics: told.append(dict(metrics))  # type: ignore[method-assign]
    batch = run.assembly.data.training_batch

    def slow(draws: Any) -> Any:
        trainer._data_s += 1e6  # as if it had waited so long
        return batch(draws)

    results = trainer.train().metrics
    run.assembly.data.training_batch = slow  # type: ignore[method-assign]
    trainer.step = 2
    trainer._one_step()
    trainer.step += 1
    assert trainer._speed()["data_time_share"] > 1
    for metrics in told:
        assert metrics["tokens_per_second"] == pytest.approx(3 * metrics["samples_per_second"])
        assert metrics["samples_per_second"] > 0
        assert 0 < metrics["data_time_share"] < 1
    assert "samples_per_second" not in results, "results are the same in every run"


def test_a_log_line_tells_where_the_time_of_its_steps_went(tmp_path: Path) -> None:
    run, trainer = make_trainer(tmp_path, steps=4, log_every=2)
    told: list[dict[str, float]] = []
    run.after_step = lambda step, metrics: told.append(dict(metrics))  # type: ignore[method-assign]
    trainer.train()
    parts = {"student_forward", "teacher_forward", "auxiliary_forward", "loss", "backward", "optimizer", "data"}
    for metrics in told:
        shares = {name.removesuffix("_time_share"): v for name, v in metrics.items() if name.endswith("_time_share")}
        assert shares.keys() == parts
        assert all(0 < share < 1 for share in shares.values())
        assert 0.5 < sum(shares.values()) <= 1.001
        assert 0.01 < metrics["peak_process_memory_gib"] < 1000
    modules = [*(player.module for player in trainer.players.values()), *trainer.objective.frozen().values()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules), "hooks are taken back"


class Watch:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("dmmd_core.usage.time.perf_counter", lambda: self.now)


def test_a_part_within_another_counts_for_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, times = Watch(monkeypatch), StepTimes(torch.device("cpu"))

    class Slow(nn.Module):
        def forward(self) -> None:
            watch.now += 3

    slow = Slow()
    assert times.shares() == {}
    with times.following({"forward": slow}):
        with times.part("before the start"):
            watch.now += 100
        times.start()
        with times.part("loss"):
            watch.now += 1
            slow()
            copy.deepcopy(slow)()  # takes the hooks along
            watch.now += 2
        watch.now += 1  # the rest
        assert times.shares() == {"loss": pytest.approx(0.3), "forward": pytest.approx(0.6)}
        assert times.shares() == {}, "to be started anew"
    times.start()
    slow()
    with times.part("loss"):
        watch.now += 1
    assert times.shares() == {"loss": pytest.approx(0.25)}


def test_an_error_within_a_forward_pass_leaves_no_part_open(monkeypatch: pytest.MonkeyPatch) -> None:
    watch, times = Watch(monkeypatch), StepTimes(torch.device("cpu"))

    class Broken(nn.Module):
        def forward(self) -> None:
            raise RuntimeError

    broken = Broken()
    times.start()
    with pytest.raises(RuntimeError), times.following({"forward": broken}), times.part("loss"):
        broken()
    watch.now += 3
    with times.part("data"):
        watch.now += 1
    assert times.shares() == {"loss": 0.0, "forward": 0.0, "data": pytest.approx(0.25)}


@pytest.mark.parametrize(("log_every", "steps", "measured"), [(50, 100, 16), (2, 6, 6), (30, 40, 16)])
def test_on_cuda_only_the_steps_before_a_log_line_are_measured(
    log_every: int, steps: int, measured: int, tmp_path: Path
) -> None:
    _, trainer = make_trainer(tmp_path, steps=steps, log_every=log_every)
    found = 0
    for trainer.step in range(steps):
        found += trainer._steps_to_log() <= 8
    assert found == measured


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_shares_and_memory_are_those_of_the_cuda_device() -> None:
    device = torch.device("cuda")
    times = StepTimes(device)
    matrix = torch.randn(2048, 2048, device=device)
    matrix @ matrix
    times.start()
    with times.part("small"):
        matrix @ matrix
    with times.part("large"):
        for _ in range(50):
            matrix @ matrix
    shares = times.shares()
    assert shares["large"] > 5 * shares["small"] > 0
    assert peak_memory(device)["peak_cuda_memory_gib"] >= 2048**2 * 4 / 2**30


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path)
    before = torch.get_rng_state()
    trainer.train()
    assert torch.equal(before, torch.get_rng_state())


def test_a_loss_that_is_not_finite_stops_the_run_with_a_reason(tmp_path: Path) -> None:
    _, trainer = make_trainer(tmp_path, log_every=1)
    with torch.no_grad():
        next(iter(trainer.players["student"].module.parameters())).fill_(torch.nan)
    with pytest.raises(RunError, match=r"not finite at step 1 of distill"):
        trainer.train()


def test_moving_average_follows_its_definition() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = MovingAverage(module, 0.5)
    value = float(module.weight.detach())
    for update in range(4):
        with torch.no_grad():
            module.weight.fill_(float(update))
        average.update(module)
        decay = min(0.5, (1 + update) / (10 + update))
        value = decay * value + (1 - decay) * update
    assert float(average.module.weight.detach()) == pytest.approx(value, abs=1e-6)


def test_learning_rate_rises_and_falls_as_told() -> None:
    flat = OptimizerSection(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(flat, step, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    linear = OptimizerSection(learning_rate=1.0, decay="linear")
    assert [learning_rate(linear, step, 10) for step in (0, 5, 9)] == [1, 0.5, pytest.approx(0.1)]
    cosine = OptimizerSection(learning_rate=1.0, decay="cosine")
    assert learning_rate(cosine, 5, 10) == pytest.approx(0.5)


def _tv(run: Run) -> dict[tuple[str, int], float]:
    results = json.loads((run.directory / "metrics.json").read_text())["results"]
    return {(r["model"], r["num_steps"]): r["value"] for r in results if r["metric"].endswith("total_variation")}


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["noise_conditioned", "deterministic"])
def test_one_step_passes_the_product_bound_with_input_noise_and_never_without(generator: str, tmp_path: Path) -> None:
    """Tied coins, one step: no product distribution comes nearer than sqrt(2) - 1 = 0.414."""
    params = "{latent: sequence, width: 16, initial_scale: 3}" if generator == "noise_conditioned" else "{}"
    overrides = [
        f"run.directory={tmp_path / 'run'}",
        f"generator={{name: {generator}, params: {params}}}",
        "distill.steps=1500",
        "distill.batch_size=256",
        "distill.optimizer.learning_rate=1e-3",
        "evaluate.teacher_steps=[1, 4]",
        "evaluate.student_steps=[1]",
    ]
    registry = load_plugins()
    run = Run(resolve(load_recipe(RECIPES / "exact_coins.yaml", overrides), registry), registry)
    run.execute()
    distances = _tv(run)
    assert distances["teacher", 1] == pytest.approx(0.5, abs=1e-9)
    assert distances["teacher", 4] == pytest.approx(0.125, abs=1e-9)
    assert distances["train", 0] == pytest.approx(2**0.5 - 1, abs=1e-3)
    if generator == "deterministic":
        assert distances["student", 1] >= 2**0.5 - 1
    else:
        assert distances["student", 1] < 0.2


def test_bfloat16_runs_train_and_sample_in_it_and_keep_float32_weights(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    recipe["run"]["precision"] = "bfloat16"
    recipe["evaluate"]["metrics"] = [{"name": "total_variation", "params": {"num_samples": 200, "batch_size": 50}}]
    run = make_run(recipe)
    seen: set[torch.dtype] = set()
    head = type(run.assembly.backbone()).head

    def spy(self: Any, features: torch.Tensor) -> torch.Tensor:
        logits = head(self, features)
        seen.add(logits.dtype)
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.assembly.backbone()), "head", spy)
        run.execute()
    assert seen == {torch.bfloat16}
    results = json.loads((run.directory / "metrics.json").read_text())["results"]
    assert {row["dtype"] for row in results} == {"bfloat16"}
    from safetensors.torch import load_file

    weights = load_file(run.directory / "student" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_a_run_stopped_in_a_later_round_goes_on_with_that_rounds_teacher(tmp_path: Path) -> None:
    weights = []
    for stop in (None, 5):
        folder = tmp_path / str(stop)
        recipe = tiny_recipe(folder, objective={"name": "sdtt", "params": {"rounds": 2, "round_average": 0.5}})
        recipe["distill"] |= {"steps": 8, "log_every": 1, "checkpoint_every": 8}
        run = make_run(recipe)
        if stop is not None:
            run.after_step = _stopper(run, stop)  # type: ignore[method-assign]
            with pytest.raises(Interrupted):
                run.execute()
            run = make_run(recipe)
        run.execute()
        weights.append(load_tensors(folder / "run" / "student" / "model.safetensors"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name])


def _stopper(run: Run, stop: int) -> Callable[[int, Mapping[str, float]], None]:
    def after_step(step: int, metrics: Mapping[str, float]) -> None:
        run.stop_requested = run.stage == "distill" and step == stop

    return after_step
