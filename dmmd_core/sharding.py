"""Networks in the hands of several processes: copies whose gradients are averaged (DDP), or shards (FSDP2).

Sharded, a module's units (`Backbone.units`) are gathered one by one when they compute. What is outside them, embeddings
and head, is gathered once per step and kept to its end: a loss asks the head for rows in chunks, whose number differs
between processes, and must not wait for the others then.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from dmmd_core.compilation import units_of
from dmmd_core.draws import Draws
from dmmd_core.interfaces import Batch, Denoiser, Objective


class Game(nn.Module):
    """An objective as a module: its forward pass is a turn's losses, so that an engine sees where gradients begin.

    Args:
        objective: The game; its players are the parameters.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective
        self.players = nn.ModuleList(player.module for player in objective.players().values())

    def forward(self, turn: tuple[str, ...], batch: Batch, draws: Draws) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by player, and metrics; see `Objective.loss`."""
        losses = self.objective.loss(turn, batch, draws)
        return losses.by_player, losses.metrics


def replicated(game: Game) -> nn.parallel.DistributedDataParallel:
    """The game with copies of its players in all processes, whose gradients are averaged while they are computed.

    Which players a turn leaves out differs from step to step, so that every step looks for parameters without gradient.
    """
    engine = nn.parallel.DistributedDataParallel
    # Buffers are the same everywhere; the option to leave them alone has changed its name.
    renamed = "forward_sync_buffers" in inspect.signature(engine).parameters
    buffers: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return engine(game, find_unused_parameters=True, gradient_as_bucket_view=True, **buffers)


def shard(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Cut a module's weights over all processes, in place; a module without weights stays as it is.

    Args:
        module: Anything with forward passes; gradients come out averaged over the processes.
        device: Where this process computes.
        dtype: Precision of the run: units are gathered in it, gradients are averaged in float32.
    """
    if next(module.parameters(), None) is None:
        return
    mesh: DeviceMesh = init_device_mesh(device.type, (dist.get_world_size(),))
    half = dtype if dtype == torch.bfloat16 else None
    policy = MixedPrecisionPolicy(
        param_dtype=half, reduce_dtype=torch.float32 if half else None, cast_forward_inputs=False
    )
    for unit in units_of(module):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    if isinstance(module, Denoiser) and module.block_size is not None:
        register_fsdp_forward_method(module, "encode")


def let_go(module: nn.Module) -> None:
    """Free what a sharded module gathered, so that its next forward pass gathers the weights of then."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, asked for by all processes together; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`whole`, on the CPU, of every tensor."""
    return {name: whole(tensor).detach().cpu() for name, tensor in tensors.items()}
