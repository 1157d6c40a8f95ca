"""Derivatives that need forward mode, or that of a gradient: torch.func's transforms, composed as there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    # Other kernels of attention know no such derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return _derivatives(function, heads, inputs, query, vectors, at_once)


def _derivatives(
    function: Callable[..., tuple[Tensor, ...]],
    heads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    query: DerivativeQuery,
    vectors: Sequence[Tensor],
    at_once: int,
) -> list[Tensor]:
    primals, places = tuple(inputs), tuple(range(len(inputs)))
    if query.kind == "jvp":
        return _changes(function, primals, query, vectors)
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


def _changes(
    function: Callable[..., tuple[Tensor, ...]],
    primals: tuple[Tensor, ...],
    query: DerivativeQuery,
    vectors: Sequence[Tensor],
) -> list[Tensor]:
    try:
        return list(torch.func.jvp(function, primals, tuple(vectors), strict=query.strict)[1])
    except RuntimeError as error:
        if not query.strict or "is independent of" not in str(error):
            raise
        raise InvalidArgument(
            "an output depends on none of the primals", field="strict", reason="OUTPUT_INDEPENDENT"
        ) from error


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
                # torch.func gives zeros where nothing changes, and never None.
                of_rows = zip(*each_of(along, unit_vectors(other), at_once), strict=True)
                for row, changes in enumerate(of_rows):
                    block = blocks[row * len(inputs) + column]
                    torch.stack([each.reshape(-1) for each in changes if each is not None], 1, out=block[element])
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
