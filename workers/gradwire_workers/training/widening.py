"""The same model in double precision, to see differences that single precision would round away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.operators import AUTOCAST_REGION
from gradwire_proto.tensors import from_any, to_torch
from gradwire_proto.values import (
    CustomFunction,
    DTypeRef,
    Graph,
    Leaf,
    LossSpec,
    Node,
    Program,
    TensorData,
    TensorSpec,
    TorchLossSpec,
    Variant,
)
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_parts import with_operators

_WIDE = {
    **dict.fromkeys(("float16", "bfloat16", "float32"), "float64"),
    **dict.fromkeys(("complex32", "complex64"), "complex128"),
}


def widened(replica: Replica, variant_name: str, change: Callable[[Variant], Variant] | None = None) -> Replica:
    """A copy of the replica, as it is now, that computes one of its variants in double precision. Its ranks' too.

    It has tensors of its own, and is thrown away soon. Its parameters are others, near those of the replica: what these
    hide (at zero, all rows may have one loss) training would bring out. change: what else becomes of the variant.
    """
    program = replica.graphs.program
    variant = replica.program.variant(variant_name)
    if change is not None:
        program, variant = with_operators(program), change(variant)
    wide = Program(
        torch_version=program.torch_version,
        tensors=tuple(replace(each, dtype=_wide(each.dtype)) for each in program.tensors),
        variants=(_variant(variant),),
        operators=program.operators,
    )
    state = {name: widen(tensor.detach()).clone() for name, tensor in replica.program.all_state().items()}
    for index, name in enumerate(replica.program.parameters_by_name()):
        _move(state[name], index)
    limits = replace(replica.limits, tensor_bytes=4 * replica.limits.tensor_bytes)
    spec = replace(replica.spec, program=wide, loss=_loss(replica.spec.loss), precision="fp32", sync_batch_norm=True)
    copy = Replica(spec, state, replica.rank, replica.device, limits)
    copy.groups = replica.groups
    return copy


def _move(parameter: Tensor, seed: int) -> None:
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    size = float(parameter.abs().square().mean()) ** 0.5 if parameter.numel() else 0.0
    parameter.add_(noise.to(parameter.device), alpha=0.2 * size + 0.05)


def widen(value: Any) -> Any:
    """A tensor in double precision, if its numbers are rounded; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    wide = _WIDE.get(str(value.dtype).removeprefix("torch."))
    return value if wide is None else value.to(getattr(torch, wide))


def _wide(dtype: str) -> str:
    return _WIDE.get(dtype, dtype)


def _variant(variant: Variant) -> Variant:
    return replace(
        variant,
        graph=_graph(variant.graph),
        loss_graph=_graph(variant.loss_graph),
        weight_graph=_graph(variant.weight_graph),
        input_leaves=tuple(map(_leaf, variant.input_leaves)),
        target_leaves=tuple(map(_leaf, variant.target_leaves)),
    )


def _leaf(leaf: Leaf) -> Leaf:
    return replace(leaf, dtype=_wide(leaf.dtype)) if isinstance(leaf, TensorSpec) else leaf


def _graph(graph: Graph | None) -> Any:
    if graph is None:
        return None
    return replace(
        graph,
        nodes=tuple(map(_node, graph.nodes)),
        subgraphs={name: _graph(each) for name, each in graph.subgraphs.items()},
        functions={name: _function(each) for name, each in graph.functions.items()},
    )


def _function(function: CustomFunction) -> CustomFunction:
    return replace(function, forward=_graph(function.forward), backward=_graph(function.backward))


def _node(node: Node) -> Node:
    if node.operator == AUTOCAST_REGION:
        return node  # autocast leaves double precision alone
    return replace(
        node,
        arguments=tuple(map(_argument, node.arguments)),
        keyword_arguments={name: _argument(each) for name, each in node.keyword_arguments.items()},
    )


def _argument(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_argument(each) for each in argument]
    return DTypeRef(_wide(argument.name)) if isinstance(argument, DTypeRef) else argument


def _loss(loss: LossSpec | None) -> LossSpec | None:
    if not isinstance(loss, TorchLossSpec):
        return loss
    options = {
        name: from_any(widen(to_torch(each))) if isinstance(each, TensorData) else each
        for name, each in loss.options.items()
    }
    return TorchLossSpec(loss.name, options)
