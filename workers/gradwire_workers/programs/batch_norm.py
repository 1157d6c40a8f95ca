"""Batch normalisation in training: where it stands in a graph, and eager's own check, which raw operators skip."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from gradwire_proto.errors import InvalidArgument

BatchNorm = Callable[..., Tensor]
"""(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled) -> output."""


def training_batch_norms(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes, subgraphs' included, that normalise with the batch's own statistics."""
    for graph_module in module.modules():
        if isinstance(graph_module, fx.GraphModule):
            for node in graph_module.graph.nodes:
                if node.meta.get("operator") == "aten.batch_norm.default" and node.args[5] is not False:
                    yield node


def replace_batch_norms(module: fx.GraphModule, function: BatchNorm) -> None:
    """Make every training batch norm call `function`."""
    for node in training_batch_norms(module):
        node.target = function
        assert node.graph.owning_module is not None
        node.graph.owning_module.recompile()


def checked_batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """torch's batch norm. Raises InvalidArgument where eager would: one value per channel has no variance."""
    if training and input.numel() == input.size(1):
        raise one_value_per_channel(tuple(input.shape))
    return torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)


def one_value_per_channel(shape: tuple[int, ...], *, of_rank: bool = False) -> InvalidArgument:
    """The error that eager raises as ValueError. of_rank: the shape is of one rank's rows, and others have more."""
    where = " on one rank, whose batch norm has no others' rows (sync_batch_norm=False)" if of_rank else ""
    return InvalidArgument(
        f"expected more than 1 value per channel when training, got input size {list(shape)}{where}",
        field="batch.inputs",
        reason="BATCH_TOO_SMALL",
    )


def positional(node_arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
    """batch_norm's nine arguments by position: its flags are read there."""
    names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    return (*node_arguments, *(keywords[name] for name in names[len(node_arguments) :]))
