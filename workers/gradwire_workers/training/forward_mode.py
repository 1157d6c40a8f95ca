"""Derivatives that need forward mode, or that of a gradient: torch.func's transforms, composed as there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import DerivativeQuery
from gradwire_workers.training.batched import each_of, unit_vectors


def forward_mode(
    function: Callable[..., tuple[Tensor, ...]],
    heads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    query: DerivativeQuery,
    vectors: Sequence[Tensor],
    at_once: int,
) -> list[Tensor]:
    """The derivative's tensors for a query of the kind "jvp", "hvp" or "hessian"; none for "none".

    function: of the inputs alone, plain operators all of them. heads: what it gives for them. vectors: checked.
    """
    primals, places = tuple(inputs), tuple(range(len(inputs)))
    if query.kind == "jvp":
        return list(torch.func.jvp(function, primals, tuple(vectors), strict=query.strict)[1])
    if query.kind == "hvp":
        if len(heads) != 1 or heads[0].dim() or heads[0].is_complex():
            raise InvalidArgument(
                "a Hessian-vector product is of one output, a real number",
                field="differentiated_outputs",
                reason="VALUE_NOT_SCALAR",
            )
        gradient = torch.func.grad(lambda *given: function(*given)[0], argnums=places)
        return list(torch.func.jvp(gradient, primals, tuple(vectors))[1])
    if query.kind == "hessian":
        return _hessian(function, heads, inputs, at_once)
    return []


def _hessian(
    function: Callable[..., tuple[Tensor, ...]], heads: Sequence[Tensor], inputs: Sequence[Tensor], at_once: int
) -> list[Tensor]:
    primals, places = tuple(inputs), tuple(range(len(inputs)))
    derivatives = []
    for position, head in enumerate(heads):
        sizes = [(head.numel(), one.numel(), other.numel()) for one in inputs for other in inputs]
        types = [torch.promote_types(one.dtype, other.dtype) for one in inputs for other in inputs]
        blocks = [torch.zeros(size, dtype=dtype, device=head.device) for size, dtype in zip(sizes, types, strict=True)]
        for element in range(head.numel()):
            gradient = _gradient_of(function, position, element, places)
            for column, other in enumerate(inputs):
                along = _along(gradient, primals, column)
                for index, changes in enumerate(each_of(along, unit_vectors(other), at_once)):
                    for row, change in enumerate(changes):
                        assert change is not None, "torch.func gives zeros where nothing changes"
                        blocks[row * len(inputs) + column][element, :, index] = change.reshape(-1)
        pairs = [(one, other) for one in inputs for other in inputs]
        derivatives += [
            block.view(*head.shape, *one.shape, *other.shape) for block, (one, other) in zip(blocks, pairs, strict=True)
        ]
    return derivatives


def _gradient_of(
    function: Callable[..., tuple[Tensor, ...]], position: int, element: int, places: tuple[int, ...]
) -> Callable[..., tuple[Tensor, ...]]:
    """Of one number of one output, with respect to every input."""

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        head, pull, *_ = torch.func.vjp(lambda *inner: function(*inner)[position], *given)
        unit = torch.zeros(head.numel(), dtype=head.dtype, device=head.device)
        unit[element] = 1
        return pull(unit.view(head.shape))

    return gradient


def _along(
    gradient: Callable[..., tuple[Tensor, ...]], primals: tuple[Tensor, ...], column: int
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def change(vector: Tensor) -> tuple[Tensor, ...]:
        tangents = tuple(vector if i == column else torch.zeros_like(each) for i, each in enumerate(primals))
        return torch.func.jvp(gradient, primals, tangents)[1]

    return change
