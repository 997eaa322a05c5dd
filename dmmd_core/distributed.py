"""The processes that work on a run together: one by default, several under ``torchrun``.

Every process holds the same `Run` and goes through the same stages. The first one (`Processes.is_main`) writes files
and speaks to observers. Everything random is a function of the global sample index, so that a batch or a set of samples
can be shared out in any way (`Processes.share`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dmmd_core.errors import DmmdError, PeerLostError, RunError, ToldElsewhereError

_Result = TypeVar("_Result")
_PATIENCE = timedelta(days=1)  # others wait while the first process prepares data or judges samples


@dataclass(frozen=True)
class Processes:
    """This process among those of a run.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.size == 1

    def share(self, count: int, parts: int = 1, part: int = 0) -> range:
        """This process's part of ``0 .. count - 1``: contiguous, without overlap, sizes at most one apart.

        Args:
            count: What is shared out.
            parts: Into how many pieces the process cuts its part.
            part: Which of them.
        """
        pieces, place = self.size * parts, self.rank * parts + part
        return range(count * place // pieces, count * (place + 1) // pieces)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the processes, float64 on the CPU, the same in each."""
        total = values.detach().to("cpu", torch.float64)
        if not self.alone:
            with others_are_there():
                dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Whether it is so in any process."""
        return flag if self.alone else bool(self.sum(torch.tensor(float(flag))))

    def wait(self) -> None:
        """Go on when all processes have come here."""
        self.sum(torch.zeros(()))

    def gather(self, value: _Result) -> list[_Result]:
        """What every process has, in the order of their numbers."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with others_are_there():
            dist.all_gather_object(found, value)
        return found

    def from_main(self, work: Callable[[], _Result]) -> _Result:
        """Let the first process work while the others wait, and hand its result to all.

        Raises:
            DmmdError: The work failed; the others raise a `ToldElsewhereError`.
        """
        if self.alone:
            return work()
        content: list[Any] = [None, None]
        error: DmmdError | None = None
        if self.is_main:
            try:
                content[0] = work()
            except DmmdError as caught:
                error = caught
                content[1] = (str(caught), caught.exit_code)
        with others_are_there():
            dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if content[1] is not None:
            raise ToldElsewhereError(*content[1])
        result: _Result = content[0]
        return result

    def main_first(self, work: Callable[[], _Result]) -> _Result:
        """Let the first process work, for example fill a cache on disk, then the others."""
        if self.alone:
            return work()
        first: list[_Result] = []
        self.from_main(lambda: first.append(work()))
        return first[0] if first else work()

    def agreed(self, error: DmmdError) -> DmmdError:
        """An error that all processes raise together: told by the first, silent in the others."""
        return error if self.is_main else ToldElsewhereError(str(error), error.exit_code)

    def leave(self) -> None:
        """End the working together; the run is done."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


def join_processes(device: torch.device) -> Processes:
    """Meet the other processes that ``torchrun`` has started; a single process where it has started none.

    Args:
        device: Where this process computes, from `own_device`.

    Raises:
        RunError: There should be others and they cannot be met.
    """
    size = started_processes()
    if size == 1:
        return Processes()
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not dist.is_available():
        what = f"{', '.join(missing)} not set" if missing else "this PyTorch has no torch.distributed"
        raise RunError(f"WORLD_SIZE is {size}, but {what}; start with torchrun, or unset WORLD_SIZE for one process")
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with others_are_there():
            dist.init_process_group(backend, timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size())


def started_processes() -> int:
    """Number of processes that ``torchrun`` has started, this one among them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def own_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU where several processes share the GPUs of a machine.

    Raises:
        RunError: One GPU was named for all, or there are fewer GPUs than processes.
    """
    if started_processes() == 1 or device.type != "cuda":
        return device
    if device.index is not None:
        raise RunError(f"run.device: {device} would serve all {started_processes()} processes; use cuda or auto")
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise RunError(
            f"run.device: process {place} of this machine has no GPU ({count} found); start {count} or fewer"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


@contextmanager
def others_are_there() -> Iterator[None]:
    """Turn what PyTorch raises when another process is gone into one error."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):  # gloo has no type of its own
            raise
        raise PeerLostError(str(error).strip().splitlines()[0]) from error
