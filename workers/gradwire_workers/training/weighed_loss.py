"""The loss of a whole batch from the losses of its shards, each of which weighs something in it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from gradwire_workers.process_group import ProcessGroups
from gradwire_workers.programs.sync_batch_norm import is_over_ranks
from gradwire_workers.shard import Shard
from gradwire_workers.training.loss_weights import LossWeight, own_weight, share_of


def weighed(loss: Tensor, weight: LossWeight, shard: Shard, groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    """(what to differentiate, what this rank adds to the batch's loss). Every rank calls it.

    A shard that weighs nothing adds nothing, whatever its own loss is: the mean over no targets is no number.
    """
    own = own_weight(weight, shard)
    everyones = [own]
    if weight.of is not None:
        everyones = groups.all_gather(torch.tensor([own], dtype=torch.float64)).reshape(-1).tolist()
    share = share_of(weight, own, everyones, shard.count, shard.rows)
    if share == 0:
        _without_gradient(loss)
        added = loss * 0, torch.zeros_like(loss, requires_grad=False)
    else:
        product = loss * share
        added = product, product.detach()
    if weight.of is None or sum(everyones) != 0 or not any(everyones):
        return added
    # Weights that cancel: what stands above the line, everybody's, tells which infinity it is, or that it is none.
    above = groups.all_reduce((loss.detach().double() * own if share else torch.zeros_like(loss)).double())
    return added[0], (above / 0 if shard.count else torch.zeros_like(above)).to(loss.dtype).detach()


def _without_gradient(loss: Tensor) -> None:
    """Let no gradient flow from the loss, though its backward may divide by zero.

    The backward runs all the same: in batch norm over ranks, other ranks' losses reach these rows.
    """
    reached = _nodes([loss.grad_fn], until_ranks=True)
    of_others = [each for node in reached if is_over_ranks(node) for each, _ in node.next_functions]
    for node in reached - _nodes(of_others, until_ranks=False):
        if node.next_functions and not is_over_ranks(node):
            node.register_hook(_zeros)


def _zeros(found: Iterable[Tensor | None], _: Any) -> tuple[Tensor | None, ...]:
    return tuple(None if each is None else torch.zeros_like(each) for each in found)


def _nodes(roots: Iterable[Any], *, until_ranks: bool) -> set[Any]:
    """The nodes of autograd's graph below these. until_ranks: and not below batch norm over ranks."""
    waiting = [root for root in roots if root is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if until_ranks and is_over_ranks(node):
            continue
        new = {each for each, _ in node.next_functions if each is not None} - seen
        seen |= new
        waiting += new
    return seen
