"""A retained forward as one step of the client's own autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from gradwire.autograd_calls import RetainedOutputs
from gradwire.errors import FailedPrecondition
from gradwire.remote_parameters import RemoteParameter
from gradwire_proto.values import BackwardQuery

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]

Backward = Callable[[BackwardQuery, Sequence[torch.Tensor | None]], "list[torch.Tensor | None] | None"]
"""Goes back through a forward on the service, whose parameters' gradients it adds to those held there."""


def attach(
    retained: RetainedOutputs,
    parameters: Sequence[RemoteParameter],
    backward: Backward,
    drop: Callable[[str], None],
) -> Any:
    """The forward's outputs, from which the client's autograd comes back to its inputs and `parameters`.

    drop: hears the forward's name when nothing on the client can come back through it any more.
    """
    if retained.name is None:
        return retained.rebuild(retained.leaves)
    step = _Step(retained.name, retained, parameters, backward)
    weakref.finalize(step, drop, retained.name).atexit = False
    tensors = [leaf for leaf in retained.leaves if isinstance(leaf, torch.Tensor)]
    outputs = iter(_Through.apply(step, tensors, *retained.inputs, *parameters))  # pyright: ignore
    return retained.rebuild([next(outputs) if isinstance(leaf, torch.Tensor) else leaf for leaf in retained.leaves])


class _Step:
    """What a node of the client's graph knows. It lives as long as the graph does."""

    def __init__(
        self, name: str, retained: RetainedOutputs, parameters: Sequence[RemoteParameter], backward: Backward
    ) -> None:
        self.name = name
        self.is_tensor = [isinstance(leaf, torch.Tensor) for leaf in retained.leaves]
        self.differentiable = retained.differentiable
        self.inputs = len(retained.inputs)
        self.devices = [each.device for each in retained.inputs]
        self.names = [each.remote_name for each in parameters]
        self.backward = backward


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, outputs: list[torch.Tensor], *inputs: torch.Tensor) -> Any:
        ctx.step = step
        ctx.set_materialize_grads(False)
        # Nothing is saved, but that something was makes torch itself refuse a second way back through a freed graph.
        ctx.save_for_backward(torch.empty(0))
        leaves = [index for index, is_tensor in enumerate(step.is_tensor) if is_tensor]
        plain = [each for index, each in zip(leaves, outputs, strict=True) if index not in step.differentiable]
        ctx.mark_non_differentiable(*plain)
        # Not views, as they came: torch refuses to change in place those that a function returns.
        return tuple(each.new_empty(0).set_(each) for each in outputs)  # pyright: ignore[reportArgumentType, reportCallIssue]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        _ = ctx.saved_tensors
        step: _Step = ctx.step
        nodes = [node for node, _ in ctx.next_functions]
        of_inputs, of_parameters = nodes[: step.inputs], nodes[step.inputs :]
        names = [name for name, node in zip(step.names, of_parameters, strict=True) if _is_added(node)]
        asks_inputs = any(_is_needed(node) for node in of_inputs)
        given = iter(cotangents)
        each_leaf = [next(given) if is_tensor else None for is_tensor in step.is_tensor]
        nothing = (None,) * (2 + step.inputs + len(step.names))
        if all(each is None for each in each_leaf) or not (names or asks_inputs):
            return nothing
        query = BackwardQuery(
            retained=step.name,
            wrt=None if len(names) == len(step.names) else tuple(names),
            input_gradients=asks_inputs,
            keep=_autograd._get_current_graph_task_keep_graph(),
        )
        found = step.backward(query, [None if each is None else each.detach() for each in each_leaf])
        if found is None:
            return nothing
        moved = [None if each is None else each.to(device) for each, device in zip(found, step.devices, strict=True)]
        return None, None, *moved, *(None,) * len(step.names)


def _is_needed(node: Any) -> bool:
    """Whether this backward wants the gradient that leads to the node."""
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A leaf that torch.autograd.grad was asked for.
        return True


def _is_added(node: Any) -> bool:
    """Whether this backward adds to the `.grad` of the placeholder whose node it is."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        raise FailedPrecondition(
            "torch.autograd.grad cannot return gradients of a remote model's parameters: call backward(), and read"
            " .grad or Model.held_gradients()",
            reason="PARAMETER_REMOTE",
        ) from None
