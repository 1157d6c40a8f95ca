"""What is checked of a derivative of a function before it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.values import DerivativeQuery


def check_wrt(query: DerivativeQuery, leaves: Sequence[Any]) -> None:
    """What is differentiated must be inputs, and numbers that have a derivative."""
    for position, index in enumerate(query.wrt):
        leaf = leaves[index] if index < len(leaves) else None
        if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
            raise InvalidArgument(
                f"expected a floating-point or complex tensor among the {len(leaves)} inputs, got leaf {index}",
                field=f"wrt[{position}]",
                reason="WRT_INVALID",
            )


def checked_heads(outputs: Sequence[Any], query: DerivativeQuery) -> list[Tensor]:
    """The outputs that are differentiated, which must be there, and numbers that have a derivative."""
    if query.outputs > len(outputs):
        raise InvalidArgument(
            f"the function has {len(outputs)} outputs, got {query.outputs}",
            field="differentiated_outputs",
            reason="INTEGER_OUT_OF_RANGE",
        )
    heads = list(outputs[: query.outputs])
    for index, head in enumerate(heads):
        if not isinstance(head, Tensor) or not (head.is_floating_point() or head.is_complex()):
            raise InvalidArgument(
                f"output {index} is no floating-point or complex tensor, and has no derivative",
                field="differentiated_outputs",
                reason="OUTPUT_NOT_DIFFERENTIABLE",
            )
    return heads


def check_real(heads: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
    """Jacobians and Hessians are of real numbers, as in torch.func: for complex ones there are several conventions."""
    for field, tensors in (("wrt", inputs), ("differentiated_outputs", heads)):
        if any(each.is_complex() for each in tensors):
            raise InvalidArgument(
                "a jacobian or hessian is of real numbers, got complex ones", field=field, reason="DTYPE_COMPLEX"
            )


def check_vectors(vectors: Sequence[Tensor], like: Sequence[Tensor]) -> None:
    """Each vector must have the shape and type of what it belongs to."""
    for index, (vector, each) in enumerate(zip(vectors, like, strict=True)):
        if vector.shape != each.shape or vector.dtype != each.dtype:
            raise InvalidArgument(
                f"expected {str(each.dtype)[6:]}{list(each.shape)}, got {str(vector.dtype)[6:]}{list(vector.shape)}",
                field=f"vectors[{index}]",
                reason="SHAPE_MISMATCH" if vector.shape != each.shape else "DTYPE_MISMATCH",
            )


def check_size(heads: Sequence[Tensor], blocks: Sequence[tuple[Tensor, ...]], tensor_bytes: int) -> None:
    """A derivative of the heads, for each by each block of inputs, must have at most `tensor_bytes` bytes."""
    nbytes = 0
    for block in blocks:
        size = max(each.element_size() for each in block)
        for each in block:
            size *= each.numel()
        nbytes += sum(head.numel() for head in heads) * size
    if nbytes > tensor_bytes:
        raise ResourceExhausted(
            f"the derivative of {[list(head.shape) for head in heads]} has {nbytes} bytes; the limit `tensor_bytes` is"
            f" {tensor_bytes}",
            field="derivative",
            reason="DERIVATIVE_TOO_LARGE",
        )
