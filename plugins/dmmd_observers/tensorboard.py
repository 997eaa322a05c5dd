"""TensorBoard: event files in the run directory, to be looked at with ``tensorboard --logdir``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dmmd_core import FieldError, Observer, Value, option
from dmmd_observers.shown import grouped, named, picture

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard(Observer):
    """Scalars, warnings, figures and samples as event files of TensorBoard.

    Each stage is a run of its own in TensorBoard, for its steps begin at 1, and so is each model of the evaluation,
    whose figures and samples stand at their numbers of sampling steps. What is written again after a resume hides what
    was written before.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Parameters."""

        directory: str = option("tensorboard", help="folder of the event files, within the run directory")
        samples: int = option(16, help="pictures or texts per model and number of steps; 0 for none", minimum=0)
        flush_seconds: int = option(30, help="most seconds until something is on disk", minimum=1)

        def __post_init__(self) -> None:
            """The folder must be within the run directory."""
            if Path(self.directory).is_absolute() or ".." in Path(self.directory).parts:
                raise FieldError("directory", f"must be within the run directory, got {self.directory!r}")

    def __init__(self, config: TensorBoard.Config, *, directory: Path) -> None:
        self.config = config
        self.directory = directory / config.directory
        self._writers: dict[str, SummaryWriter] = {}

    @classmethod
    def check(cls, config: Any) -> None:
        """Refuse a run that could not be shown."""
        if find_spec("tensorboard") is None:
            raise FieldError(
                "",
                "observer tensorboard needs the package tensorboard; pip install 'dmmd[tensorboard]', or leave it out",
            )

    def on_step(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """See `Observer.on_step`."""
        writer = self._writer(stage, step)
        for name, value in grouped(metrics).items():
            writer.add_scalar(name, value, step)

    def on_figures(self, model: str, num_steps: int, figures: Sequence[Value]) -> None:
        """See `Observer.on_figures`."""
        writer = self._writer(f"evaluate_{model}", num_steps)
        for name, figure in named(figures):
            writer.add_scalar(f"figures/{name}", figure.value, num_steps)
        writer.flush()

    def on_samples(self, model: str, num_steps: int, samples: Tensor | Sequence[str]) -> None:
        """See `Observer.on_samples`."""
        count = self.config.samples
        if not count:
            return
        writer = self._writer(f"evaluate_{model}", num_steps)
        if isinstance(samples, Tensor):
            writer.add_image("samples", picture(samples, count), num_steps)
        else:
            writer.add_text("samples", _verbatim(samples[:count]), num_steps)

    def on_warning(self, stage: str, step: int, message: str) -> None:
        """See `Observer.on_warning`."""
        self._writer(stage, step).add_text("warnings", message, step)

    def on_checkpoint(self, stage: str, step: int, path: Path) -> None:
        """See `Observer.on_checkpoint`."""
        self._flush()

    def on_stage(self, stage: str, seconds: float) -> None:
        """See `Observer.on_stage`."""
        self._flush()

    def end(self, error: BaseException | None) -> None:
        """See `Observer.end`."""
        while self._writers:
            self._writers.popitem()[1].close()

    def _writer(self, name: str, step: int) -> SummaryWriter:
        """The writer of a stage or model, which hides what an earlier life has written from this step on."""
        if name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            self._writers[name] = SummaryWriter(
                str(self.directory / name), purge_step=step, flush_secs=self.config.flush_seconds
            )
        return self._writers[name]

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()


def _verbatim(lines: Sequence[str]) -> str:
    """Text for TensorBoard, which reads Markdown: as a block of code, where nothing means anything."""
    return "\n".join(f"    {line}" for text in lines for line in (*text.splitlines(), ""))
