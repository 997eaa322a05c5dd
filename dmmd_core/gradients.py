"""Gradients taken together with the losses, summed over chunks and handed on by the backward pass.

Fused linear cross-entropy does so for one loss and one head (Hsu et al., "Liger Kernel", arXiv:2410.10989); here losses
and heads are whatever autograd differentiates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode


class Leaves:
    """Stand-ins for rows of larger tensors: a chunk's graph begins at them, and so at nothing older than the chunk.

    Args:
        index: Which rows, int64 ``[rows]``.
    """

    def __init__(self, index: Tensor) -> None:
        self.index = index
        self.first_node = torch._C._autograd._get_sequence_nr()
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}

    def cut(self, tensor: Tensor) -> Tensor:
        """Return the chosen rows of `tensor` ``[all rows, ...]`` as a leaf."""
        leaf = tensor.detach()[self.index].requires_grad_(tensor.requires_grad)
        self._originals[id(leaf)] = (leaf, tensor)
        return leaf

    def original(self, leaf: Tensor) -> Tensor | None:
        """What `leaf` was cut from; None for a tensor that was not cut."""
        return self._originals[id(leaf)][1] if id(leaf) in self._originals else None


class GradientSums(TorchFunctionMode):
    """Gradients of several losses in all tensors that they reach, summed over chunks.

    As a context it lets linear layers add the gradient of their weight to its sum in place: for a head that is the
    largest tensor of all.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tensors: dict[int, Tensor] = {}
        self._sums: dict[tuple[int, int], Tensor] = {}  # by number of the loss and id of the tensor
        self._loss = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the parameters of linear layers out of the chunk's graph."""
        if func is nn.functional.linear and not torch.compiler.is_compiling() and torch.is_grad_enabled():
            rows, *parameters = _linear_arguments(*args, **(kwargs or {}))
            if rows.requires_grad and parameters[0].requires_grad and all(map(_is_plain, parameters)):
                return _SummedLinear.apply(rows, self, parameters)
        return func(*args, **(kwargs or {}))

    def add(self, losses: list[Tensor], leaves: Leaves) -> bool:
        """Differentiate one chunk's losses, scalars, and let go of their graphs: the list is emptied.

        Returns:
            Whether that could be done; if not, the losses need the ordinary backward pass.
        """
        graphs = [_Graph(loss, leaves.first_node) for loss in losses]
        if not all(graph.self_contained for graph in graphs):
            return False
        keep = [any(graph.meets(later) for later in graphs[place + 1 :]) for place, graph in enumerate(graphs)]
        ends = [graph.leaves for graph in graphs]
        del graphs  # they hold nodes, and so memory
        for place, (inputs, retain) in enumerate(zip(ends, keep, strict=True)):
            self._loss = place
            loss = losses.pop(0)
            if inputs:
                with torch.autocast(loss.device.type, enabled=False):  # as in a backward pass
                    found = torch.autograd.grad(loss, inputs, retain_graph=retain, allow_unused=True)
                for leaf, gradient in zip(inputs, found, strict=True):
                    if gradient is not None:
                        self._add(leaf, gradient, leaves)
        return True

    def _add(self, leaf: Tensor, gradient: Tensor, leaves: Leaves) -> None:
        original = leaves.original(leaf)
        if original is None:
            self.sum_of(leaf).add_(gradient)
        else:
            known = self.sum_of(original)
            known.index_add_(0, leaves.index, gradient.to(known.dtype))

    def sum_of(self, tensor: Tensor) -> Tensor:
        """The sum for `tensor`, of the loss that is being differentiated, at least float32: it has many small terms."""
        key = (self._loss, id(tensor))
        if key not in self._sums:
            self._tensors[id(tensor)] = tensor
            wide = torch.promote_types(tensor.dtype, torch.float32)
            self._sums[key] = torch.zeros_like(tensor, dtype=wide, requires_grad=False)
        return self._sums[key]

    def behind(self, totals: Tensor) -> Tensor:
        """Return `totals` ``[losses]``, mere values, with a graph that leads to every tensor reached."""
        numbers = {name: number for number, name in enumerate(self._tensors)}
        sums = [(loss, numbers[name], known) for (loss, name), known in self._sums.items()]
        result: Tensor = _HandOn.apply(totals, sums, *self._tensors.values())
        return result


class _Graph:
    """The nodes behind a loss and the leaves where they end.

    Attributes:
        leaves: Tensors without history that the loss is computed from.
        self_contained: Whether gradients may be taken now: no node is older than `first_node`, for other chunks would
            need it again, and no leaf carries a hook, which would see the parts of a gradient and then their sum.
    """

    def __init__(self, loss: Tensor, first_node: int) -> None:
        self.leaves: list[Tensor] = []
        self.self_contained = True
        self._nodes: set[Node] = set()
        waiting = [] if loss.grad_fn is None else [loss.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node in self._nodes:
                continue
            self._nodes.add(node)
            if node.name() == "torch::autograd::AccumulateGrad":
                self.leaves.append(node.variable)
                self.self_contained &= not node.variable._backward_hooks
            else:
                self.self_contained &= node._sequence_nr() >= first_node
                waiting.extend(earlier for earlier, _ in node.next_functions if earlier is not None)

    def meets(self, other: _Graph) -> bool:
        """Whether both graphs have a node in common, whose memory is then needed twice."""
        return not self._nodes.isdisjoint(other._nodes)


class _SummedLinear(torch.autograd.Function):
    """``rows W^T + b`` whose parameters' gradients go straight into their sums."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sums: GradientSums, parameters: Sequence[Tensor]) -> Tensor:
        ctx.sums, ctx.parameters = sums, parameters
        ctx.save_for_backward(rows)
        return nn.functional.linear(rows, *parameters)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        weight, *biases = ctx.parameters
        rows = rows.to(incoming.dtype).flatten(0, -2)
        incoming_rows = incoming.flatten(0, -2)
        known = ctx.sums.sum_of(weight)
        if known.dtype == incoming.dtype:
            known.addmm_(incoming_rows.T, rows)
        else:
            known.add_(incoming_rows.T @ rows)
        for bias in biases:
            if bias.requires_grad:
                ctx.sums.sum_of(bias).add_(incoming_rows.sum(0))
        return incoming @ weight.to(incoming.dtype), None, None


class _HandOn(torch.autograd.Function):
    """Values whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, totals: Tensor, sums: list[tuple[int, int, Tensor]], *tensors: Tensor) -> Tensor:
        ctx.sums = sums
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        return totals.clone()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("a loss in chunks cannot be differentiated twice; set chunk_rows to 0")
        if ctx.sums is None:
            raise RuntimeError(
                "the gradients of a loss in chunks have been handed on already; compute the loss again, or say "
                "retain_graph=True the first time"
            )
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        handed: list[Tensor | None] = [None] * len(ctx.dtypes)
        for loss, number, known in ctx.sums:
            # Without a copy where nobody will ask again: the next owner may keep the tensor itself.
            scaled = known * incoming[loss] if keep else known.mul_(incoming[loss])
            earlier = handed[number]
            handed[number] = scaled if earlier is None else earlier + scaled
        if not keep:
            ctx.sums = None
        return (
            None,
            None,
            *(one if one is None else one.to(dtype) for one, dtype in zip(handed, ctx.dtypes, strict=True)),
        )


def _linear_arguments(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    return [input, weight] if bias is None else [input, weight, bias]


def _is_plain(tensor: Tensor) -> bool:
    """A leaf of no special kind."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_leaf
