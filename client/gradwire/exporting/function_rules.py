"""What a torch.autograd.Function must not do for its graphs to compute what it does: each rule with its refusal."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils import _pytree as pytree

from gradwire_proto.errors import ExportError
from gradwire_proto.graph_writes import written_backward
from gradwire_proto.values import CustomFunction


def refused(function: type, what: str, *, reason: str = "EXPORT_CUSTOM_FUNCTION") -> ExportError:
    """The error that names the function and says what it does: a verb first."""
    return ExportError(
        f"{function.__module__}.{function.__qualname__}, a torch.autograd.Function, {what}",
        reason=reason,
    )


def needs_values(error: BaseException) -> bool:
    """Whether an export failed because Python wanted a tensor's value."""
    return "DataDependent" in type(error).__name__ or "data-dependent" in str(error)


def refuse_arguments(function: type, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
    """Tensors in containers get no gradient in eager either, and a truth value of sizes has no place in a message."""
    if keywords:
        raise refused(function, "is called with keyword arguments, which autograd does not take: give them by position")
    for argument in arguments:
        if isinstance(argument, torch.SymBool):
            raise refused(function, "is given a truth value that depends on the batch's size: pass the size itself")
        if not isinstance(argument, Tensor) and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(argument)):
            raise refused(
                function,
                "is given tensors inside a container, and autograd gives those no gradient: pass each tensor as an"
                " argument of its own, with apply(*tensors)",
            )


def refuse_results(function: type, output: Any) -> None:
    """Results that are no tensors would be what they were when the function was exported."""
    results = output if isinstance(output, tuple) else (output,)
    if not results or not all(isinstance(result, Tensor) for result in results):
        raise refused(
            function, "returns something that is no tensor: return tensors alone, and compute the rest outside"
        )


def refuse_writes_in_backward(function: type, encoded: CustomFunction, operators: Mapping[str, str]) -> None:
    """What a backward changes in place is seen by others: in which order, and on how many ranks, nobody can say."""
    gradients, inputs = written_backward(encoded, operators)
    if gradients:
        raise refused(function, "changes the gradient that its backward is given in place: change a clone of it")
    if inputs:
        raise refused(
            function,
            "changes one of its arguments in place in its backward: change it in the forward, or change a clone",
        )


def refuse_transforms(function: type) -> None:
    """Under torch.func the function is differentiated by other rules than those that its graphs have."""
    raise refused(
        function, "is called inside torch.vmap or torch.func, which cannot be exported: call it on whole batches"
    )


@contextmanager
def context_watched(function: type) -> Iterator[None]:
    """Inside, what a function asks of its context in this thread, and no graph can give, raises ExportError."""
    thread = threading.get_ident()
    mark_dirty, set_materialize_grads = FunctionCtx.mark_dirty, FunctionCtx.set_materialize_grads

    def refusing_mark_dirty(ctx: Any, *tensors: Any) -> None:
        if threading.get_ident() == thread:
            raise refused(
                function, "changes an argument in place (ctx.mark_dirty): change a clone of it, and return that"
            )
        mark_dirty(ctx, *tensors)

    def refusing_none(ctx: Any, value: bool) -> None:
        if threading.get_ident() == thread and not value:
            raise refused(
                function,
                "calls ctx.set_materialize_grads(False), after which its backward depends on which gradients there"
                " are: leave that call out, and it gets zeros for those that nobody has",
            )
        set_materialize_grads(ctx, value)

    patched: Any = FunctionCtx
    patched.mark_dirty, patched.set_materialize_grads = refusing_mark_dirty, refusing_none
    try:
        yield
    finally:
        patched.mark_dirty, patched.set_materialize_grads = mark_dirty, set_materialize_grads
