"""Runs by several gloo processes on this machine, for tests; they start from a server that has torch loaded already."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")


def run_together(
    size: int, recipe: dict[str, Any], out: Path, *, kill: int | None = None, stop: int | None = None
) -> list[dict[str, Any]]:
    """Run a recipe with so many processes.

    Args:
        size: Number of processes.
        recipe: As a mapping.
        out: Folder for what they tell.
        kill: Step of the distillation in which the last process kills itself.
        stop: Step of the distillation at which the last process is asked to stop.

    Returns:
        What each process told: ``steps`` (stage, step, metrics), ``results``, ``error``; nothing of a killed one.
    """
    _CONTEXT.set_forkserver_preload(["torch", "torch.distributed.fsdp", "dmmd_core.pipeline", "helpers"])
    out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = place.getsockname()[1]
    children = [
        _CONTEXT.Process(target=_child, args=(rank, size, port, recipe, str(out), kill, stop)) for rank in range(size)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode is not None, "a process hangs"
    told = []
    for rank in range(size):
        path = out / f"{rank}.json"
        told.append(json.loads(path.read_text()) if path.exists() else {})
    return told


def _child(
    rank: int, size: int, port: int, recipe: dict[str, Any], out: str, kill: int | None, stop: int | None
) -> None:
    import torch
    from helpers import make_run

    from dmmd_core.errors import DmmdError

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"TORCH_CPP_LOG_LEVEL": "ERROR", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    steps: list[Any] = []
    told: dict[str, Any] = {"steps": steps, "error": None}
    run = make_run(recipe)
    run.after_step = lambda step, metrics: steps.append([run.stage, step, dict(metrics)])  # type: ignore[method-assign]
    batch = run.assembly.data.training_batch

    def watched(draws: Any) -> Any:
        if run.stage == "distill" and rank == size - 1:
            if draws.step == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            run.stop_requested |= draws.step == stop
        return batch(draws)

    run.assembly.data.training_batch = watched  # type: ignore[method-assign]
    try:
        run.execute()
    except DmmdError as error:
        told["error"] = [type(error).__name__, str(error)]
    told["results"] = [{key: row[key] for key in ("model", "metric", "value")} for row in run.metrics["results"]]
    (Path(out) / f"{rank}.json").write_text(json.dumps(told))
