"""The Hessian of a batch's loss times a vector: backwards twice, as in torch.autograd.functional.hvp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwire_proto.values import GradientQuery
from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.batch_loss import gather_rows
from gradwire_workers.training.gradient_reading import GradientReading, converted, gradient_type
from gradwire_workers.training.gradients import add_up
from gradwire_workers.training.replica import Replica


def read_products(
    replica: Replica,
    shard: Shard,
    query: GradientQuery,
    vectors: Mapping[str, tuple[Tensor, Tensor]],
    command: int,
) -> GradientReading:
    """Hessian times vector over the whole batch, by name, and the loss. `vectors`: (parameter, vector) by name.

    Split over the ranks where their parts of the loss add up as functions of the parameters. Where only the parts'
    gradients do (batch norm over all ranks, losses over the gathered batch), rank 0 computes the whole batch.
    """
    parameters = [parameter for parameter, _ in vectors.values()]
    dtype = gradient_type(query, parameters)
    groups = replica.groups
    if groups is not None and not shard.whole and replica.synchronises(shard.variant):
        shard = _whole(replica, shard, groups)
    # Other kernels of attention have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        loss = _part(replica, shard, query, command)
        if loss is None and not shard.idle:
            assert groups is not None, "a whole batch has its loss"
            shard = _whole(replica, shard, groups)
            loss = _part(replica, shard, query, command)
        found: list[Tensor | None] = [None] * len(parameters)
        value: Tensor | float = 0.0
        if loss is not None and shard.count:
            value, found = loss.detach(), _products(loss, parameters, [vector for _, vector in vectors.values()])
    if groups is not None and not shard.whole:
        found = add_up(found, parameters, groups)
    products = [
        torch.zeros_like(like, requires_grad=False) if each is None else each
        for each, like in zip(found, parameters, strict=True)
    ]
    return GradientReading(
        value=value,
        rows=shard.count,
        gradients={name: converted(each, dtype) for name, each in zip(vectors, products, strict=True)},
    )


def _part(replica: Replica, shard: Shard, query: GradientQuery, command: int) -> Tensor | None:
    """This rank's part of the loss, as a function of the parameters; None where the parts do not add up as such."""
    if shard.idle:
        return None
    replica.seed(shard, command, query.seed)
    outputs = replica.outputs(shard)
    return replica.loss(shard, outputs).differentiable if replica.adds_up(shard, outputs) else None


def _products(loss: Tensor, parameters: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    if not loss.requires_grad:
        return [None] * len(parameters)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    # A gradient that no parameter moves changes along no vector.
    pairs = [(each, v) for each, v in zip(gradients, vectors, strict=True) if each is not None and each.requires_grad]
    if not pairs:
        return [None] * len(parameters)
    moving, along = zip(*pairs, strict=True)
    return list(torch.autograd.grad(moving, parameters, along, allow_unused=True))


def _whole(replica: Replica, shard: Shard, groups: ProcessGroups) -> Shard:
    """The whole batch for rank 0, and an idle shard for the others. Every rank calls it."""
    variant = replica.program.variant(shard.variant)
    inputs, targets = (
        tuple(gather_rows(leaf, shard, groups) if has_rows(spec) else leaf for leaf, spec in pairs)
        for pairs in (
            list(zip(shard.inputs, variant.input_leaves, strict=True)),
            list(zip(shard.targets, variant.target_leaves, strict=True)) if shard.targets else [],
        )
    )
    if groups.rank:
        return replace(shard, start=shard.rows, stop=shard.rows, whole=True, idle=True, inputs=(), targets=())
    return replace(shard, start=0, stop=shard.rows, whole=True, inputs=inputs, targets=targets)
