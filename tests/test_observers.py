"""Observers of a recipe: what they are told, what TensorBoard and Weights & Biases keep of it, and resumed runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from helpers import RECIPES, ROOT, dmmd_run, tiny_recipe, write_recipe

from dmmd_core import RunError, Value, load_plugins, load_student
from dmmd_core.cli import run_command
from dmmd_core.recipe import differing_keys, load_recipe
from dmmd_core.testing import check_observer
from dmmd_observers.tensorboard import TensorBoard
from dmmd_observers.wandb import WeightsAndBiases

STEPS = 12
# Raises where the distillation has been logged beyond its newest checkpoint.
STOPS = """
from dmmd_core import RunError, hookimpl

@hookimpl
def dmmd_after_step(run, step, metrics):
    if run.stage == "distill" and step == 8:
        raise RunError("pulled the plug")
"""
# An observer that writes down all it is told.
DIARY = """
import json
from dmmd_core import Observer, hookimpl

class Diary(Observer):
    \"\"\"Writes down all it is told.\"\"\"

    def __init__(self, config, *, directory, name, recipe):
        self.path, self.name, self.recipe = directory / "diary.jsonl", name, recipe

    def note(self, *words):
        with self.path.open("a") as file:
            file.write(json.dumps(words) + "\\n")

    def begin(self):
        self.note("begin", self.name, self.recipe["distill"]["num_steps"])

    def on_step(self, stage, step, metrics):
        self.note("step", stage, step, dict(metrics))

    def on_figures(self, model, num_steps, figures):
        self.note("figures", model, num_steps, [figure.metric for figure in figures])

    def on_samples(self, model, num_steps, samples):
        self.note("samples", model, num_steps, len(samples), samples[0])

    def on_warning(self, stage, step, message):
        self.note("warning", stage, step, message)

    def on_checkpoint(self, stage, step, path):
        self.note("checkpoint", stage, step, path.exists())

    def on_stage(self, stage, seconds):
        self.note("stage", stage, seconds > 0)

    def end(self, error):
        self.note("end", repr(error))

@hookimpl
def dmmd_register(registry):
    registry.add("observer", "diary", Diary)
"""


def _recipe(directory: Path, *observers: dict[str, Any]) -> dict[str, Any]:
    recipe = tiny_recipe(directory, observers=list(observers))
    recipe["distill"] |= {"steps": STEPS, "log_every": 1, "checkpoint_every": 5}
    recipe["objective"] = {"name": "moment_matching", "params": {"alarm_gap": 1e-3}}  # an alarm, sooner or later
    recipe["evaluate"]["teacher_steps"] = [4, 1]
    return recipe


def _plugin(directory: Path, name: str, code: str) -> str:
    path = directory / f"{name}.py"
    path.write_text(code)
    return str(path)


def test_an_observer_is_told_all_that_happens(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, _recipe(tmp_path, {"name": "diary"}))
    done = dmmd_run(recipe, "--plugin", _plugin(tmp_path, "diary", DIARY))
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "diary.jsonl").read_text().splitlines()]
    assert lines[0] == ["begin", "tiny", 2]
    assert lines[-1] == ["end", "None"]
    assert [line[2] for line in lines if line[:2] == ["step", "distill"]] == list(range(1, STEPS + 1))
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry["metrics"] for entry in logged if entry["event"] == "step" and entry["stage"] != "evaluate"]
    assert [line[3] for line in lines if line[0] == "step"] == steps, "the same numbers as in the log"
    assert [line[1] for line in lines if line[0] == "stage"] == ["data", "initialize", "distill", "evaluate"]
    assert [line[2:] for line in lines if line[:2] == ["checkpoint", "distill"]] == [[5, True], [10, True], [12, True]]
    assert any(line[0] == "warning" and "auxiliary is far from the teacher" in line[3] for line in lines)
    judged = [("train", 0), ("test", 0), ("teacher", 1), ("teacher", 4), ("student", 2)]  # steps rise
    for event in ("samples", "figures"):
        assert [tuple(line[1:3]) for line in lines if line[0] == event] == judged
    samples = next(line for line in lines if line[0] == "samples")
    assert samples[3] == 20  # evaluate.num_samples, which is less than observers are shown at most
    assert re.fullmatch(r"\d( \d)*", samples[4])


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def _events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a run with TensorBoard that was stopped beyond a checkpoint, and run to its end."""
    directory = tmp_path_factory.mktemp("interrupted")
    recipe = write_recipe(directory, _recipe(directory, {"name": "tensorboard"}))
    done = dmmd_run(recipe, "--plugin", _plugin(directory, "stops", STOPS))
    assert done.returncode == 2
    assert "pulled the plug" in done.stderr
    before = _events(directory / "run" / "tensorboard" / "distill").Scalars("training/student_loss")
    assert [event.step for event in before] == list(range(1, 8)), "told, though no checkpoint holds steps 6 and 7"
    done = dmmd_run(recipe)
    assert done.returncode == 0, done.stderr
    assert "going on from step 5" in done.stderr
    return directory / "run"


def test_tensorboard_shows_every_scalar_of_every_stage_once_after_a_resume(interrupted: Path) -> None:
    entries = [json.loads(line) for line in (interrupted / "log.jsonl").read_text().splitlines()]
    for stage in ("initialize", "distill"):
        events = _events(interrupted / "tensorboard" / stage)
        logged: dict[str, dict[int, float]] = {}
        for entry in entries:
            if entry["event"] == "step" and entry["stage"] == stage:
                for name, value in entry["metrics"].items():
                    logged.setdefault(name, {})[entry["step"]] = value
        shown = {tag.partition("/")[2]: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        assert shown.keys() == logged.keys()
        for name, curve in logged.items():
            assert [event.step for event in shown[name]] == sorted(curve)
            assert [event.value for event in shown[name]] == pytest.approx([curve[step] for step in sorted(curve)])
    tags = set(_events(interrupted / "tensorboard" / "distill").Tags()["scalars"])
    assert {"training/student_loss", "engine/backward_time_share", "engine/peak_process_memory_gib"} <= tags


def test_tensorboard_shows_warnings_figures_and_samples(interrupted: Path) -> None:
    board = interrupted / "tensorboard"
    warnings = _events(board / "distill").Tensors("warnings/text_summary")
    assert warnings
    assert len({event.step for event in warnings}) == len(warnings)
    for event in warnings:
        assert event.tensor_proto.string_val[0].startswith(b"the auxiliary is far from the teacher")
    results = json.loads((interrupted / "metrics.json").read_text())["results"]
    for model, steps in (("teacher", [1, 4]), ("student", [2]), ("test", [0]), ("train", [0])):
        events = _events(board / f"evaluate_{model}")
        for metric in ("token_entropy", "distinct_samples"):
            wanted = [(r["num_steps"], r["value"]) for r in results if (r["model"], r["metric"]) == (model, metric)]
            found = [(event.step, event.value) for event in events.Scalars(f"figures/{metric}")]
            assert found == [(step, pytest.approx(value)) for step, value in wanted]
            assert [step for step, _ in found] == steps
        samples = events.Tensors("samples/text_summary")
        assert [event.step for event in samples] == steps
        lines = samples[-1].tensor_proto.string_val[0].decode().splitlines()
        assert all(re.fullmatch(r"    (\d \d \d)?", line) for line in lines)


def test_tensorboard_shows_pictures(tmp_path: Path) -> None:
    observer = TensorBoard(TensorBoard.Config(samples=4), directory=tmp_path)
    observer.begin()
    images = torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8)
    observer.on_samples("student", 2, images)
    observer.on_figures("student", 2, [Value("fid", 3.5, reference="a"), Value("fid", math.nan, reference="b")])
    observer.end(None)
    events = _events(tmp_path / "tensorboard" / "evaluate_student")
    (image,) = events.Images("samples")
    assert (image.step, image.width, image.height) == (2, 2 * 48 + 3 * 6, 2 * 48 + 3 * 6)
    assert events.Scalars("figures/fid (a)")[0].value == 3.5
    assert math.isnan(events.Scalars("figures/fid (b)")[0].value)


# ---- Weights & Biases -----------------------------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """What the observer uses of wandb 0.31, writing down what it is given."""

    class Error(Exception):
        """Base of the package's errors."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict[str, Any]] = []
        self.axes: dict[str, str] = {}
        self.rows: list[dict[str, Any]] = []
        self.ends: list[int] = []
        self.Settings = SimpleNamespace
        self.Image = lambda array: ("picture", array.shape)
        self.Table = lambda columns, data: ("table", columns, data)
        self.refusal: Exception | None = None

    def init(self, **arguments: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        self.begun.append(arguments)
        return SimpleNamespace(
            define_metric=lambda name, step_metric: self.axes.__setitem__(name, step_metric),
            log=self.rows.append,
            finish=lambda exit_code: self.ends.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_ERROR_REPORTING", raising=False)
    return fake


def _observer(directory: Path, **config: Any) -> WeightsAndBiases:
    made = WeightsAndBiases.Config(**config)
    return WeightsAndBiases(made, directory=directory, name="mine", recipe={"schema": 1})


def _tell(observer: WeightsAndBiases, steps: range, error: BaseException | None = None) -> None:
    observer.begin()
    for step in steps:
        observer.on_step("distill", step, {"student_loss": 1 / step, "samples_per_second": 5.0})
    observer.on_warning("distill", 4, "look at this")
    observer.on_samples("student", 2, ["a", "b"])
    observer.on_figures("student", 2, [Value("fid", 3.5)])
    observer.end(error)


def test_wandb_is_told_each_thing_once_on_an_axis_of_its_own(tmp_path: Path, wandb: FakeWandb) -> None:
    _tell(_observer(tmp_path), range(1, 5), RuntimeError("pre-empted"))
    _tell(_observer(tmp_path), range(3, 7))
    assert [row["distill/training/student_loss"] for row in wandb.rows if "distill/training/student_loss" in row] == [
        1 / step for step in range(1, 7)
    ]
    assert wandb.rows[0] == {
        "distill/step": 1, "distill/training/student_loss": 1.0, "distill/engine/samples_per_second": 5.0
    }  # fmt: skip
    others = [row for row in wandb.rows if "distill/training/student_loss" not in row]
    assert others == [
        {"distill/step": 4, "distill/warning": "look at this"},
        {"evaluate_student/num_steps": 2, "evaluate_student/samples": ("table", ["sample"], [["a"], ["b"]])},
        {"evaluate_student/num_steps": 2, "evaluate_student/fid": 3.5},
    ]
    assert wandb.axes == {"distill/*": "distill/step", "evaluate_student/*": "evaluate_student/num_steps"}
    assert wandb.ends == [1, 0]
    first, second = wandb.begun
    assert first["id"] == second["id"]
    assert first["config"] == {"schema": 1}


def test_wandb_is_offline_unless_the_recipe_says_otherwise(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tell(_observer(tmp_path), range(1, 2))
    (begun,) = wandb.begun
    assert (begun["mode"], begun["dir"], begun["resume"]) == ("offline", str(tmp_path), None)
    assert os.environ.pop("WANDB_ERROR_REPORTING") == "false"
    _tell(_observer(tmp_path / "..", mode="online", entity="team"), range(1, 2))
    assert (wandb.begun[1]["mode"], wandb.begun[1]["entity"], wandb.begun[1]["resume"]) == ("online", "team", "allow")
    assert "WANDB_ERROR_REPORTING" not in os.environ
    monkeypatch.setitem(sys.modules, "wandb", None)  # not even imported
    _tell(_observer(tmp_path / "nowhere", mode="disabled"), range(1, 2))
    assert WeightsAndBiases.smoke(WeightsAndBiases.Config(mode="online", project="p")) == WeightsAndBiases.Config(
        mode="disabled", project="p"
    )


def test_wandb_that_refuses_is_one_message(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.refusal = wandb.Error("api_key not configured (no-tty).\nmore")
    wanted = r"cannot begin \(api_key not configured \(no-tty\)\.\); log in with `wandb login`"
    with pytest.raises(RunError, match=wanted):
        _observer(tmp_path, mode="online").begin()


def test_wandb_writes_an_offline_run_for_real(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    recipe = write_recipe(tmp_path, _recipe(tmp_path, {"name": "wandb", "params": {"project": "test"}}))
    done = dmmd_run(recipe)
    assert done.returncode == 0, done.stderr
    identity = json.loads((tmp_path / "run" / "wandb.json").read_text())["id"]
    (file,) = (tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    content = file.read_bytes()
    for name in (b"distill/training/student_loss", b"evaluate_student/token_entropy", b"initialize/step"):
        assert name in content
    assert not re.search(r"^wandb:", done.stderr, flags=re.MULTILINE), "the package says nothing in between"


def test_wandb_keeps_the_contract_offline() -> None:
    pytest.importorskip("wandb")
    check_observer("wandb", {"mode": "offline"})


# ---- recipes --------------------------------------------------------------------------------------------------------


def test_observers_have_no_part_in_what_a_run_is(tmp_path: Path) -> None:
    plain = write_recipe(tmp_path, tiny_recipe(tmp_path))
    old, new = load_recipe(plain), load_recipe(plain, ["observers=[{name: tensorboard, params: {samples: 3}}]"])
    assert differing_keys(old, new) == []
    assert differing_keys(old, dataclasses.replace(new, name="another")) == ["name"]


def test_a_run_is_resumed_with_another_observer_and_its_models_tell_of_none(interrupted: Path) -> None:
    recipe = interrupted.parent / "recipe.yaml"
    arguments = [str(recipe), "observers=[{name: wandb, params: {mode: disabled, entity: my_team}}]", "--quiet"]
    assert run_command([*arguments, "--dry-run"]) == 0
    assert run_command(arguments) == 0
    config = json.loads((interrupted / "student" / "config.json").read_text())
    assert config["recipe"]["observers"] == []
    assert not any(name.startswith("observer") for name in config["providers"])
    assert yaml.safe_load((interrupted / "recipe.yaml").read_text())["observers"][0]["name"] == "tensorboard"
    assert load_student(interrupted).sample(2).shape == (2, 3)


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_told_before_anything_runs(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"dmmd_observers.{name}.find_spec", lambda name: None)
    recipe = write_recipe(tmp_path, _recipe(tmp_path, {"name": name}))
    wanted = rf"observers\[0\]: observer {name} needs the package {package}; pip install 'dmmd\[{package}\]'"
    assert run_command([str(recipe)]) == 2
    assert re.search(rf"recipe\.yaml:\d+: {wanted}", capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
    assert run_command([str(recipe), "--check"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "What the run needs and does not find here" in out
    assert f"pip install 'dmmd[{package}]'" in out


def test_mistakes_in_an_observer_are_told_by_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = [
        {"name": "tensorbord"},
        {"name": "tensorboard", "params": {"directory": "../out", "samples": -1}},
        {"name": "wandb", "params": {"mode": "sometimes"}},
    ]
    recipe = write_recipe(tmp_path, _recipe(tmp_path, *wrong))
    assert run_command([str(recipe), "--check"]) == 2
    told = capsys.readouterr().err
    assert "observers[0].name: no observer named 'tensorbord' is installed; did you mean 'tensorboard'?" in told
    assert "observers[1].params.samples: must be at least 0, got -1" in told
    assert "observers[2].params.mode" in told
    recipe = write_recipe(tmp_path, _recipe(tmp_path, {"name": "tensorboard", "params": {"directory": "../out"}}))
    assert run_command([str(recipe), "--check"]) == 2
    assert "observers[0].params.directory: must be within the run directory, got '../out'" in capsys.readouterr().err


def test_the_list_of_components_names_the_observers() -> None:
    assert load_plugins().names("observer") == ["tensorboard", "wandb"]


def test_no_recipe_of_the_tree_has_an_observer() -> None:
    for path in RECIPES.glob("*.yaml"):
        assert "observers" not in yaml.safe_load(path.read_text())


def test_the_observer_of_the_page_keeps_the_contract() -> None:
    namespace: dict[str, Any] = {"__name__": __name__}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "observing.md").read_text(), flags=re.DOTALL):
        exec(block, namespace)
    check_observer(namespace["Losses"])
