"""Derivatives of a function of tensors that are no gradients: products with vectors, Jacobians and Hessians.

Reverse mode is plain autograd, so that a custom function's own backward counts. What needs forward mode, or that of a
gradient, is a composition of torch.func's transforms: see forward_mode.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import DerivativeQuery
from gradwire_workers.training.batched import Results, each_of, unit_vectors
from gradwire_workers.training.derivative_checks import check_real, check_size, check_vectors, check_wrt, checked_heads
from gradwire_workers.training.forward_mode import forward_mode

Function = Callable[[Sequence[Any]], list[Any]]
"""Leaves -> flat outputs, the same for the same leaves."""

_AT_ONCE_BYTES = 1 << 28
"""Vectors are computed together as long as none of the function's tensors becomes larger than this by it."""


def derive(
    function: Function,
    leaves: Sequence[Any],
    query: DerivativeQuery,
    vectors: Sequence[Tensor],
    *,
    tensor_bytes: int,
    has_functions: bool,
    has_conditions: bool,
) -> tuple[list[Any], list[Tensor]]:
    """(the outputs, the derivative's tensors, in the order that the contract gives).

    has_functions, has_conditions: whether custom functions or torch.cond are called, which know their first derivative
    in reverse mode alone.
    Raises InvalidArgument where wrt, vectors or outputs do not fit, and for what these do not know
    (GRADIENT_UNKNOWN); ResourceExhausted DERIVATIVE_TOO_LARGE, before it is computed, where the derivative has more
    than `tensor_bytes` bytes.
    """
    check_wrt(query, leaves)
    inputs = [leaves[index].detach() for index in query.wrt]
    if query.kind in ("jvp", "hvp", "hessian"):
        if has_functions:
            raise _unknown("a custom function was exported with its own backward alone", query)
        if has_conditions:
            raise _unknown("torch.cond is differentiated once, backwards", query)
    if query.kind in ("vjp", "jacobian"):
        inputs = [each.requires_grad_() for each in inputs]
    largest = _Largest()
    with torch.set_grad_enabled(query.kind in ("vjp", "jacobian")), largest:
        outputs = function(_put(leaves, query.wrt, inputs))
    heads = checked_heads(outputs, query)
    if query.kind in ("jacobian", "hessian"):
        check_real(heads, inputs)
    at_once = max(1, _AT_ONCE_BYTES // max(largest.nbytes, 1))
    if query.kind == "vjp":
        check_vectors(vectors, heads)
        derivatives = _vjp(heads, inputs, vectors)
    elif query.kind == "jacobian":
        check_size(heads, [(each,) for each in inputs], tensor_bytes)
        derivatives = _jacobian(heads, inputs, min(query.chunk_size or at_once, at_once))
    else:
        if query.kind in ("jvp", "hvp"):
            check_vectors(vectors, inputs)
        if query.kind == "hessian":
            check_size(heads, [(one, other) for one in inputs for other in inputs], tensor_bytes)

        def of_inputs(*given: Tensor) -> tuple[Tensor, ...]:
            return tuple(function(_put(leaves, query.wrt, given))[: query.outputs])

        derivatives = forward_mode(of_inputs, heads, inputs, query, vectors, at_once)
    return [each.detach() if isinstance(each, Tensor) else each for each in outputs], derivatives


def _unknown(why: str, query: DerivativeQuery) -> InvalidArgument:
    return InvalidArgument(
        f"{why}, and a {query.kind} needs another derivative", field="derivative", reason="GRADIENT_UNKNOWN"
    )


def _put(leaves: Sequence[Any], places: Sequence[int], inputs: Sequence[Tensor]) -> list[Any]:
    given = list(leaves)
    for place, tensor in zip(places, inputs, strict=True):
        given[place] = tensor
    return given


def _vjp(heads: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    pairs = [(head, vector) for head, vector in zip(heads, vectors, strict=True) if head.requires_grad]
    if not pairs:
        return [torch.zeros_like(each, requires_grad=False) for each in inputs]
    found = torch.autograd.grad(
        [head for head, _ in pairs], inputs, [vector for _, vector in pairs], allow_unused=True, materialize_grads=True
    )
    # A custom function may hand out what it was given: copies, which nobody else holds.
    return [each.detach().clone() for each in found]


def _jacobian(heads: Sequence[Tensor], inputs: Sequence[Tensor], at_once: int) -> list[Tensor]:
    derivatives = []
    for head in heads:
        blocks = [torch.zeros((head.numel(), *each.shape), dtype=each.dtype, device=each.device) for each in inputs]
        if head.requires_grad:
            rows = each_of(_gradients(head, inputs), unit_vectors(head), at_once, _gradients(head, inputs, many=True))
            for index, row in enumerate(rows):
                for block, gradient in zip(blocks, row, strict=True):
                    if gradient is not None:
                        block[index] = gradient
        derivatives += [block.view((*head.shape, *each.shape)) for block, each in zip(blocks, inputs, strict=True)]
    return derivatives


def _gradients(head: Tensor, inputs: Sequence[Tensor], *, many: bool = False) -> Callable[[Tensor], Results]:
    """Of the head, weighted with a vector; many: with each of several, stacked."""
    return lambda vector: torch.autograd.grad(
        head, inputs, vector, retain_graph=True, allow_unused=True, is_grads_batched=many
    )


class _Largest(TorchDispatchMode):
    """Inside, remembers how many bytes the largest result of an operator has."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                self.nbytes = max(self.nbytes, each.numel() * each.element_size())
        return result
