"""Gradients for a caller to look at: of chosen parameters and of inputs, over the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import GradientQuery, Leaf
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.agreement import are_finite
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.passes import Passes, own_rows
from gradwire_workers.training.snapshots import Snapshot

_BACKOFF = 16.0
"""What the loss scale is divided by for another try: four steps lead from torch's first scale to none."""


@dataclass(frozen=True, kw_only=True)
class GradientReading:
    """What a rank found. value: what it adds to the loss. rows: those it computed. The rest as in a GradientReport."""

    value: Tensor | float
    rows: int
    gradients: dict[str, Tensor]
    input_gradients: list[Tensor | None] | None = None
    outputs: list[Any] | None = None


def read_gradients(
    passes: Passes, shard: Shard, query: GradientQuery, parameters: Mapping[str, Tensor], command: int
) -> GradientReading:
    """Loss, gradients with respect to `parameters` and inputs, and outputs, as the query asks.

    Where the loss is scaled and gradients overflow, smaller scales are tried: nobody else would learn from it.
    InvalidArgument (DTYPE_NOT_COMPLEX) where a complex gradient is asked for in a real type.
    """
    if passes.scale <= 1.0:
        return _read(passes, shard, query, parameters, command)
    buffers = Snapshot(passes.buffers(shard))
    while True:
        found = _read(passes, shard, query, parameters, command)
        if passes.scale <= 1.0 or not _some_overflowed(found, passes):
            return found
        buffers.restore()
        passes.scale = max(passes.scale / _BACKOFF, 1.0)


def _some_overflowed(found: GradientReading, passes: Passes) -> bool:
    mine = not are_finite([*found.gradients.values(), *(found.input_gradients or ())])
    if passes.groups is None:
        return mine
    flag = torch.tensor([mine], dtype=torch.uint8)
    return passes.groups.all_reduce(flag, largest=True).item() > 0


def _read(
    passes: Passes, shard: Shard, query: GradientQuery, parameters: Mapping[str, Tensor], command: int
) -> GradientReading:
    leaves = [_differentiable(leaf) for leaf in shard.inputs] if query.input_gradients else list(shard.inputs)
    inputs = {index: leaf for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad}
    dtype = gradient_type(query, [*parameters.values(), *inputs.values()])
    shard = replace(shard, inputs=tuple(leaves))
    done = passes.local(
        shard, [*parameters.values(), *inputs.values()], command, seed=query.seed, with_outputs=query.outputs
    )
    of_parameters = dict(zip(parameters, done.gradients[: len(parameters)], strict=True))
    of_inputs = dict(zip(inputs, done.gradients[len(parameters) :], strict=True))
    groups, specs = passes.groups, passes.variant(shard).input_leaves
    if groups is not None and not shard.whole:
        shared = [index for index in inputs if not has_rows(specs[index])]
        summed = add_up(
            [*of_parameters.values(), *(of_inputs[index] for index in shared)],
            [*parameters.values(), *(inputs[index] for index in shared)],
            groups,
        )
        of_parameters = dict(zip(parameters, summed[: len(parameters)], strict=True))
        of_inputs |= dict(zip(shared, summed[len(parameters) :], strict=True))
    input_gradients = None
    if query.input_gradients and not shard.idle:
        input_gradients = [
            converted(_part(of_inputs[index], leaf, shard, specs[index]), dtype) if index in inputs else None
            for index, leaf in enumerate(leaves)
        ]
    return GradientReading(
        value=done.value,
        rows=shard.count,
        gradients={
            name: converted(gradient, dtype) for name, gradient in of_parameters.items() if gradient is not None
        },
        input_gradients=input_gradients,
        outputs=done.outputs,
    )


def _differentiable(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
        return leaf.detach().requires_grad_()
    return leaf


def _part(gradient: Tensor | None, leaf: Tensor, shard: Shard, spec: Leaf) -> Tensor:
    """This rank's part. An input that the loss does not depend on has a gradient all the same, as in torch.func."""
    if gradient is None:
        gradient = torch.zeros_like(leaf, requires_grad=False)
    return own_rows(gradient, shard) if has_rows(spec) else gradient


def gradient_type(query: GradientQuery, of: Sequence[Tensor]) -> torch.dtype | None:
    """The type that the query asks for; None for each gradient's own. Refuses one that drops imaginary parts."""
    dtype = None if query.gradient_dtype is None else torch_dtype(query.gradient_dtype)
    if dtype is not None and not dtype.is_complex and any(tensor.is_complex() for tensor in of):
        raise InvalidArgument(
            f"a gradient is complex, and {str(dtype)[6:]} would drop its imaginary part",
            field="gradient_dtype",
            reason="DTYPE_NOT_COMPLEX",
        )
    return dtype


def converted(gradient: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The gradient in that type."""
    return gradient if dtype is None else gradient.to(dtype)
