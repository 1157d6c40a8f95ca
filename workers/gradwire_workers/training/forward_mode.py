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
    primals, derivatives = tuple(inputs), []
    for position, head in enumerate(heads):
        pairs = [(one, other) for one in inputs for other in inputs]
        blocks = [
            torch.zeros((head.numel(), one.numel(), other.numel()), dtype=one.dtype, device=head.device)
            for one, other in pairs
        ]
        together = at_once // head.numel() if head.numel() > 1 else 0
        if not _fill_together(blocks, function, position, primals, together):
            for element in range(head.numel()):
                gradient = _gradient_of(function, position, element)
                _fill([block[element : element + 1] for block in blocks], gradient, primals, at_once)
        derivatives += [
            block.view((*head.shape, *one.shape, *other.shape))
            for block, (one, other) in zip(blocks, pairs, strict=True)
        ]
    return derivatives


def _fill_together(
    blocks: Sequence[Tensor],
    function: Callable[..., tuple[Tensor, ...]],
    position: int,
    primals: tuple[Tensor, ...],
    at_once: int,
) -> bool:
    """Fills the blocks with gradients of all numbers of an output at once, if that can be had. See `each_of`."""
    if not at_once:
        return False
    try:
        _fill(blocks, _gradients_of(function, position), primals, at_once)
    except Exception:
        return False
    return True


def _fill(
    blocks: Sequence[Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    primals: tuple[Tensor, ...],
    at_once: int,
) -> None:
    """blocks: for each primal by each primal one of [gradients, the one's numbers, the other's]."""
    for column, other in enumerate(primals):
        along = _along(gradient, primals, column)
        for index, changes in enumerate(each_of(along, unit_vectors(other), at_once)):
            for row, change in enumerate(changes):
                assert change is not None, "torch.func gives zeros where nothing changes"
                block = blocks[row * len(primals) + column]
                block[:, :, index] = change.reshape(block.shape[:2])


def _gradients_of(function: Callable[..., tuple[Tensor, ...]], position: int) -> Callable[..., tuple[Tensor, ...]]:
    """Of every number of one output, stacked, with respect to every input."""

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        head, pull, *_ = torch.func.vjp(lambda *inner: function(*inner)[position], *given)
        units = torch.eye(head.numel(), dtype=head.dtype, device=head.device)
        return torch.func.vmap(pull, randomness="error")(units.view(head.numel(), *head.shape))

    return gradients


def _gradient_of(
    function: Callable[..., tuple[Tensor, ...]], position: int, element: int
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
