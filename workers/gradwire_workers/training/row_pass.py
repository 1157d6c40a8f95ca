"""One forward and backward of a variant on some rows, as it is tried: nothing is changed by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_workers.shard import Shard
from gradwire_workers.training.closeness import has_rounding
from gradwire_workers.training.failures import as_program_failure
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.snapshots import Snapshot

_NOT_TAKEN = frozenset({"ASSERTION_FAILED", "PROGRAM_FAILED", "INDEX_OUT_OF_RANGE", "TARGET_OUT_OF_RANGE"})


@dataclass(frozen=True, kw_only=True)
class PassResult:
    """outputs: those that are tensors; others: those that are not. gradients: of the trainable parameters, and of the
    inputs' leaves."""

    outputs: list[Tensor]
    others: list[Any]
    parameters: list[Tensor | None]
    inputs: dict[int, Tensor | None]
    buffers: list[Tensor]


class RowsMissingError(Exception):
    """An output does not have one entry for each row."""


def run_pass(
    replica: Replica,
    shard: Shard,
    cotangent: Callable[[int, Tensor], Tensor],
    have_rows: Callable[[list[Tensor]], bool] | None = None,
) -> PassResult:
    """One pass; buffers are as before after it. Raises RowsMissingError where `have_rows(outputs)` is not true."""
    leaves = {index: leaf.detach().requires_grad_() for index, leaf in enumerate(shard.inputs) if has_rounding(leaf)}
    # Copies, because a graph may change its inputs in place.
    inputs = [leaves[i].clone() if i in leaves else copied(leaf) for i, leaf in enumerate(shard.inputs)]
    mutated = replica.program.mutated_buffers(shard.variant)
    before = Snapshot(mutated)
    outputs = replica.row_outputs(replica.outputs(replace(shard, inputs=tuple(inputs))))
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    if have_rows is not None and not have_rows(tensors):
        before.restore()
        raise RowsMissingError
    buffers = [buffer.detach().clone() for buffer in mutated]
    trainable = trainable_of(replica)
    heads = [(index, output) for index, output in enumerate(tensors) if output.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * (len(trainable) + len(leaves))
    if heads and gradients:
        gradients = torch.autograd.grad(
            [output for _, output in heads],
            [*trainable, *leaves.values()],
            [cotangent(index, output) for index, output in heads],
            allow_unused=True,
        )
    outputs_now = [tensor.detach().clone() for tensor in tensors]
    before.restore()
    return PassResult(
        outputs=outputs_now,
        others=[output for output in outputs if not isinstance(output, Tensor)],
        parameters=list(gradients[: len(trainable)]),
        inputs=dict(zip(leaves, gradients[len(trainable) :], strict=True)),
        buffers=buffers,
    )


def is_not_taken(error: Exception) -> bool:
    """Whether an error says that a program does not take these numbers, as one that takes shares between 0 and 1."""
    failure = as_program_failure(error)
    return isinstance(failure, InvalidArgument) and failure.reason in _NOT_TAKEN


def trainable_of(replica: Replica) -> list[Tensor]:
    """The parameters that are trained."""
    return [parameter for parameter in replica.program.parameters_by_name().values() if parameter.requires_grad]


def copied(leaf: Any) -> Any:
    """A copy of a tensor: a graph may change its inputs in place."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def weights_of_rows(index: int, output: Tensor) -> Tensor:
    """What each number counts in the value that is differentiated: random, so that no sum over rows hides anything."""
    generator = torch.Generator().manual_seed(index)
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return weights.to(output.device, output.dtype)
