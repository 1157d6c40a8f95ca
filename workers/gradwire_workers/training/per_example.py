"""Each example's own gradients: those of the loss of a batch of that row alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.values import GradientQuery, Leaf
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.gradient_reading import GradientReading, converted, gradient_type
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.snapshots import Snapshot

_AT_ONCE = 64
"""Rows that are computed together: their gradients are as many times as large as the parameters."""


def read_per_example(
    replica: Replica,
    shard: Shard,
    query: GradientQuery,
    parameters: Mapping[str, Tensor],
    command: int,
    tensor_bytes: int,
) -> GradientReading:
    """The gradients of this rank's rows, one after another in dimension 0, and the sum of their losses.

    ResourceExhausted (GRADIENTS_TOO_LARGE), before any is computed, where those of the whole batch have more than
    `tensor_bytes` bytes together. Rows are computed together where every operator can be, otherwise one by one.
    """
    wanted = list(parameters.values())
    dtype = gradient_type(query, wanted)
    _check_size(shard.rows, wanted, tensor_bytes)
    found = [torch.empty((shard.count, *each.shape), dtype=each.dtype, device=each.device) for each in wanted]
    value: Tensor | float = 0.0
    if shard.count:
        rows = _Rows(replica, shard, query.seed, command)
        done = rows.together(wanted) if rows.are_alike() else None
        value = done[0] if done is not None else rows.one_by_one(wanted, found)
        found = found if done is None else done[1]
    return GradientReading(
        value=value,
        rows=shard.count,
        gradients={name: converted(each, dtype) for name, each in zip(parameters, found, strict=True)},
    )


def _check_size(rows: int, parameters: Sequence[Tensor], tensor_bytes: int) -> None:
    nbytes = rows * sum(each.numel() * each.element_size() for each in parameters)
    if nbytes > tensor_bytes:
        raise ResourceExhausted(
            f"the gradients of {rows} examples have {nbytes} bytes; the limit `tensor_bytes` is {tensor_bytes}: ask for"
            " fewer parameters (wrt) or examples at once",
            field="per_example",
            reason="GRADIENTS_TOO_LARGE",
        )


class _Rows:
    """The rows of a shard, each as a batch of its own, which this rank has in full."""

    def __init__(self, replica: Replica, shard: Shard, seed: int | None, command: int) -> None:
        self._replica = replica
        self._program = replica.program
        self._shard = shard
        self._seed = seed
        self._command = command
        variant = self._program.variant(shard.variant)
        self._specs = (*variant.input_leaves, *variant.target_leaves) if shard.targets else variant.input_leaves
        self._leaves = (*shard.inputs, *shard.targets)

    def are_alike(self) -> bool:
        """Whether rows differ in their numbers alone: nothing is random, and none leaves anything behind."""
        variant = self._shard.variant
        return not (
            self._program.is_random(variant)
            or self._program.mutated_buffers(variant)
            or self._program.has_functions(variant)
            or self._program.has_batch_norm(variant)
        )

    def together(self, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]] | None:
        """(the sum of their losses, their gradients); None where some operator cannot be run so."""
        try:
            with torch.no_grad():
                first = self._alone(self._leaves_of(0))
                self._replica.check_targets(self._shard, self._replica.outputs(first))
            dims = tuple(0 if has_rows(spec) else None for spec in self._specs)
            tensors = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

            def loss(values: tuple[Tensor, ...], *given: Tensor) -> Tensor:
                leaves = list(self._leaves)
                for index, leaf in zip(tensors, given, strict=True):
                    leaves[index] = leaf.unsqueeze(0) if dims[index] == 0 else leaf
                with self._program.reading(dict(zip(parameters, values, strict=True))):
                    return self._loss(self._alone(leaves))

            of_all = torch.func.vmap(
                torch.func.grad_and_value(loss),
                in_dims=(None, *(dims[index] for index in tensors)),
                randomness="error",
                chunk_size=_AT_ONCE,
            )
            detached = tuple(each.detach() for each in parameters)
            gradients, losses = of_all(detached, *(self._leaves[index] for index in tensors))
        except Exception:
            # What is wrong with a row comes out of it alone.
            return None
        return losses.sum(), list(gradients)

    def one_by_one(self, parameters: Sequence[Tensor], into: Sequence[Tensor]) -> Tensor:
        """Writes their gradients; returns the sum of their losses. The last row's buffers stay as it leaves them."""
        before = Snapshot(self._program.mutated_buffers(self._shard.variant))
        total = []
        for row in range(self._shard.count):
            before.restore()
            # By the row's place in the whole batch: the same for every number of ranks.
            self._replica.seed(self._shard, self._command, self._seed, stream=self._shard.start + row)
            loss = self._loss(self._alone(self._leaves_of(row)))
            gradients: Sequence[Tensor | None] = [None] * len(parameters)
            if loss.requires_grad and parameters:
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for all_rows, gradient in zip(into, gradients, strict=True):
                all_rows[row] = 0 if gradient is None else gradient
            total.append(loss.detach())
        return torch.stack(total).sum()

    def _loss(self, shard: Shard) -> Tensor:
        return self._replica.loss(shard, self._replica.outputs(shard)).differentiable

    def _leaves_of(self, row: int) -> list[Any]:
        return [_row(leaf, spec, row) for leaf, spec in zip(self._leaves, self._specs, strict=True)]

    def _alone(self, leaves: Sequence[Any]) -> Shard:
        inputs = len(self._shard.inputs)
        return replace(
            self._shard,
            rows=1,
            start=0,
            stop=1,
            whole=True,
            inputs=tuple(leaves[:inputs]),
            targets=tuple(leaves[inputs:]),
        )


def _row(leaf: Any, spec: Leaf, row: int) -> Any:
    return leaf[row : row + 1] if has_rows(spec) else leaf
