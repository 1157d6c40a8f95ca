"""One computation for each of many vectors: together where every operator can be run so, and one by one where not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor | None, ...]


def each_of(
    compute: Callable[[Tensor], Results],
    vectors: Iterable[Tensor],
    at_once: int,
    compute_many: Callable[[Tensor], Results] | None = None,
) -> Iterator[Results]:
    """`compute` of each vector, in order, `at_once` of them together at most.

    compute_many: what computes several, stacked in dimension 0; torch.func.vmap where left out. Not every operator can
    be run so: random ones must not, some change their inputs in place, others look at values. Where it raises anything,
    every vector from there on is computed alone: what is wrong with it then comes out of that.
    """
    many = compute_many or torch.func.vmap(compute, randomness="error")
    remaining = iter(vectors)
    while group := tuple(islice(remaining, at_once)):
        results = _together(many, group) if len(group) > 1 else None
        if results is None:
            yield from map(compute, chain(group, remaining))
            return
        yield from results


def _together(many: Callable[[Tensor], Any], group: tuple[Tensor, ...]) -> list[Results] | None:
    try:
        stacked = many(torch.stack(group))
    except Exception:
        return None
    columns = ([None] * len(group) if each is None else each.unbind(0) for each in stacked)
    return list(zip(*columns, strict=True))


def unit_vectors(like: Tensor) -> Iterator[Tensor]:
    """The vectors of the shape of `like` with a single one, in order."""
    for index in range(like.numel()):
        vector = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        vector[index] = 1
        yield vector.view(like.shape)
