"""Weights & Biases: the same as a run of wandb, offline unless the recipe says otherwise."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from dmmd_core import FieldError, Observer, RunError, Value, option
from dmmd_core.checkpoint import write_text
from dmmd_observers.shown import grouped, named, picture

_STATE = "wandb.json"


class WeightsAndBiases(Observer):
    """Scalars, warnings, figures and samples as a run of Weights & Biases.

    A resumed run goes on under the same id (``wandb.json`` in the run directory), and what was told before is not told
    again.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        project: str = option("dmmd", help="project of Weights & Biases")
        entity: str | None = option(None, help="user or team; null for the account's own")
        group: str | None = option(None, help="group of runs that belong together")
        tags: list[str] = option([], help="labels of the run")
        mode: Literal["offline", "online", "disabled"] = option(
            "offline", help="offline writes files for wandb sync, online sends them, disabled does nothing"
        )
        samples: int = option(16, help="pictures or texts per model and number of steps; 0 for none", minimum=0)

    def __init__(
        self, config: WeightsAndBiases.Config, *, directory: Path, name: str, recipe: Mapping[str, Any]
    ) -> None:
        self.config = config
        self.directory = directory
        self.name = name
        self.recipe = recipe
        self._run: Any = None
        self._defined: set[str] = set()
        self._told: dict[str, int] = {}

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a run that could not be shown."""
        if config.mode != "disabled" and find_spec("wandb") is None:
            raise FieldError("", "observer wandb needs the package wandb; pip install 'dmmd[wandb]', or leave it out")

    @classmethod
    def smoke(cls, config: Any) -> Any:
        """See `Component.smoke`: what is thrown away is shown nowhere."""
        return type(config)(**{**vars(config), "mode": "disabled"})

    def begin(self) -> None:
        """See `Observer.begin`.

        Raises:
            RunError: The service refuses, or cannot be reached.
        """
        config = self.config
        if config.mode == "disabled":
            return
        online = config.mode == "online"
        if not online:
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # the package's own reports of its crashes
        import wandb

        state = self._read_state()
        self._told = state["told"]
        try:
            self._run = wandb.init(
                project=config.project,
                entity=config.entity,
                name=self.name,
                group=config.group,
                tags=config.tags,
                config=dict(self.recipe),
                dir=str(self.directory),
                mode=config.mode,
                id=state["id"],
                resume="allow" if online else None,
                settings=wandb.Settings(console="off", silent=True),
            )
        except wandb.Error as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise RunError(
                f"observer wandb cannot begin ({reason}); log in with `wandb login`, or set its mode to offline"
            ) from error
        self._id = state["id"]
        self._write_state()

    def on_step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer.on_step`."""
        self._log(stage, "step", step, "", grouped(metrics))

    def on_figures(self, model: str, num_steps: int, figures: Sequence[Value]) -> None:
        """See `Observer.on_figures`."""
        values = {name: figure.value for name, figure in named(figures)}
        self._log(f"evaluate_{model}", "num_steps", num_steps, "figures", values)

    def on_samples(self, model: str, num_steps: int, samples: Tensor | Sequence[str]) -> None:
        """See `Observer.on_samples`."""
        if self._run is None or not self.config.samples:
            return
        import wandb

        shown: Any
        if isinstance(samples, Tensor):
            shown = wandb.Image(picture(samples, self.config.samples).permute(1, 2, 0).numpy())
        else:
            shown = wandb.Table(columns=["sample"], data=[[text] for text in samples[: self.config.samples]])
        self._log(f"evaluate_{model}", "num_steps", num_steps, "samples", {"samples": shown})

    def on_warning(self, stage: str, step: int, message: str) -> None:
        """See `Observer.on_warning`."""
        self._log(stage, "step", step, "warning", {"warning": message})

    def end(self, error: BaseException | None) -> None:
        """See `Observer.end`."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
            self._run = None

    def _log(self, place: str, axis: str, at: int, what: str, values: Mapping[str, Any]) -> None:
        """Log values at a place on an axis of their own, unless that was done in an earlier life."""
        key = f"{place}/{what}"
        if self._run is None or at <= self._told.get(key, -1):
            return
        if place not in self._defined:
            self._defined.add(place)
            self._run.define_metric(f"{place}/*", step_metric=f"{place}/{axis}")
        self._run.log({f"{place}/{axis}": at, **{f"{place}/{name}": value for name, value in values.items()}})
        self._told[key] = at
        self._write_state()

    def _read_state(self) -> dict[str, Any]:
        path = self.directory / _STATE
        if not path.exists():
            return {"id": secrets.token_hex(4), "told": {}}
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return state

    def _write_state(self) -> None:
        write_text(self.directory / _STATE, json.dumps({"id": self._id, "told": self._told}, indent=2) + "\n")
