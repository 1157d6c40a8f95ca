"""Calls of the user's torch.autograd.Functions during an export: each becomes a node of its own, with its two graphs.

torch.export would look into the forward and differentiate that, and so lose the backward.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import function as function_internals

from gradwire.exporting.function_rules import refuse_arguments, refuse_transforms, refused
from gradwire.exporting.function_trace import KINDS, FunctionTrace, trace_function
from gradwire_proto.function_replay import ReplayedFunction, call_function


class LeavesUnknown(Exception):
    """A function of the user's was called, and the export does not know yet which inputs may have gradients."""


class Capture:
    """The functions that one export calls, in order.

    leaves_known: whether the inputs that may have gradients say so (requires_grad). Where not, the first call of a
    function raises LeavesUnknown: what its backward computes depends on it.
    """

    current: Capture | None = None

    def __init__(self, *, leaves_known: bool) -> None:
        self.traces: list[FunctionTrace] = []
        self._leaves_known = leaves_known
        self._tracing = False
        self._thread = threading.get_ident()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, this thread's calls of the user's functions are captured."""
        internals: Any = function_internals
        original, capture = internals.custom_function_call, self

        def plain(cls: type, *arguments: Any, **keywords: Any) -> Any:
            return super(internals._SingleLevelFunction, cls).apply(*arguments, **keywords)  # type: ignore[misc]

        def apply(cls: type, *arguments: Any, **keywords: Any) -> Any:
            if capture._concerns(cls):
                return capture._call(cls, plain.__get__(cls), arguments, keywords)
            return plain(cls, *arguments, **keywords)

        def custom_function_call(cls: type, *arguments: Any, **keywords: Any) -> Any:
            if threading.get_ident() == capture._thread and _is_users(cls):
                refuse_transforms(cls)
            return original(cls, *arguments, **keywords)

        # Every way of calling one ends in these two, `f = Function.apply` kept from before included.
        internals._SingleLevelFunction.apply = classmethod(apply)
        internals.custom_function_call = custom_function_call
        Capture.current = self
        try:
            yield
        finally:
            del internals._SingleLevelFunction.apply
            internals.custom_function_call = original
            Capture.current = None

    def insert(self, module: fx.GraphModule) -> None:
        """Put the functions' graphs where the exported graph calls them: it runs, and can be encoded."""
        if not self.traces:
            return
        for each in [each for each in module.modules() if isinstance(each, fx.GraphModule)]:
            for node in [node for node in each.graph.nodes if node.target is _operator()]:
                self._insert(each, node)
            each.recompile()

    def _insert(self, module: fx.GraphModule, node: fx.Node) -> None:
        arguments: Any = node.args
        index, *groups = arguments
        trace = self.traces[index]
        name = f"custom_function_{index}"
        replayed = ReplayedFunction(
            trace.forward,
            trace.backward,
            results=len(trace.results),
            differentiable_results=trace.differentiable_results,
            differentiable_inputs=trace.differentiable_inputs,
        )
        replayed.origin = trace.function
        module.add_submodule(name, replayed)
        with module.graph.inserting_before(node):
            function = module.graph.get_attr(name)
            call = module.graph.call_function(call_function, (function, *_in_order(trace, *groups)))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)

    def _concerns(self, cls: type) -> bool:
        # Inside another function of the user's autograd runs it as it is, and its operators are traced.
        return threading.get_ident() == self._thread and not self._tracing and _is_users(cls)

    def _call(self, cls: type, plain: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        refuse_arguments(cls, arguments, keywords)
        if torch.is_grad_enabled() and not self._leaves_known:
            raise LeavesUnknown
        tensors = [each for each in arguments if isinstance(each, Tensor)]
        self._tracing = True
        try:
            if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
                # Nobody will ask for its backward.
                return plain(*arguments)
            trace = trace_function(cls, plain, arguments)
        finally:
            self._tracing = False
        self.traces.append(trace)
        varying = [each for each in arguments if isinstance(each, KINDS)]
        constants = [torch.ops.aten.lift_fresh_copy.default(constant) for constant in trace.constants]
        groups = [[each for each in varying if isinstance(each, kind)] for kind in KINDS]
        results = _operator()(len(self.traces) - 1, [*groups[0], *constants], *groups[1:])
        return results[0] if trace.single else tuple(results)


def _is_users(cls: type) -> bool:
    return not cls.__module__.startswith("torch.") and cls is not _Opaque


def _in_order(trace: FunctionTrace, tensors: Sequence[Any], sizes: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """The inputs of the function's forward, from the groups in which the operator takes them."""
    groups = dict(zip(KINDS, (iter(tensors), iter(sizes), iter(numbers)), strict=True))
    return [next(groups[kind]) for kind in trace.kinds]


@cache
def _library() -> torch.library.Library:
    """Holds the operator that stands for functions: gone with it, so it is kept."""
    library = torch.library.Library("gradwire_export", "FRAGMENT")
    library.define("function(int which, Tensor[] tensors, SymInt[] sizes, Scalar[] numbers) -> Tensor[]")
    torch.library.register_fake("gradwire_export::function", _without_values, lib=library)
    library.impl("function", _with_gradients, "Autograd")
    return library


def _operator() -> Any:
    """What stands for a function while torch.export runs: (which, tensors, sizes, numbers) -> results."""
    _library()
    return torch.ops.gradwire_export.function.default


def _trace(which: int) -> FunctionTrace:
    assert Capture.current is not None
    return Capture.current.traces[which]


def _without_values(which: int, tensors: Any, sizes: Any, numbers: Any) -> list[Tensor]:
    return [
        torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=result.device)
        for result in _trace(which).results
    ]


def _with_gradients(which: int, tensors: Any, sizes: Any, numbers: Any) -> list[Tensor]:
    return list(_Opaque.apply(which, sizes, numbers, *tensors))  # type: ignore[arg-type]


class _Opaque(torch.autograd.Function):
    """Makes the results need gradients where the function's do; nobody asks for them while torch.export runs."""

    @staticmethod
    def forward(ctx: Any, which: int, sizes: Any, numbers: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.which = which
        with torch._C._AutoDispatchBelowAutograd():
            results = _operator()(which, list(tensors), sizes, numbers)
        differentiable = _trace(which).differentiable_results
        ctx.mark_non_differentiable(*(each for index, each in enumerate(results) if index not in differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise refused(
            _trace(ctx.which).function,
            "is differentiated inside the module itself (torch.autograd.grad in a forward), and its gradient would be"
            " differentiated again: let client.grad or the training step differentiate it, once",
        )
