"""How a custom function runs: two graphs as one torch.autograd.Function, for ranks and for those who compare with them.

Both graphs are of plain operators, made below autograd and autocast, and run below them: their types are fixed in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradwire_proto.errors import InvalidArgument


class ReplayedFunction(nn.Module):
    """The function: called with its inputs it returns the list of its results. See `values.CustomFunction`.

    Raises InvalidArgument where a graph gives what it must not, and GRADIENT_UNKNOWN for the gradient of an input
    that the backward knows nothing of, and for second derivatives.
    """

    def __init__(
        self,
        forward_graph: nn.Module,
        backward_graph: nn.Module,
        *,
        results: int,
        differentiable_results: Sequence[int],
        differentiable_inputs: Sequence[int],
    ) -> None:
        super().__init__()
        self.forward_graph = forward_graph
        self.backward_graph = backward_graph
        self.results = results
        self.differentiable_results = tuple(differentiable_results)
        self.differentiable_inputs = tuple(differentiable_inputs)
        # Whoever makes it from a class may say which, for messages.
        self.origin: type = ReplayedFunction
        # Is called with the backward graph and what it takes, before it runs.
        self.before_backward: Callable[[nn.Module, Sequence[Any]], None] = _nothing

    def forward(self, *inputs: Any) -> list[Tensor]:
        return list(_Replay.apply(self, *inputs))  # type: ignore[arg-type]

    def with_graphs(self, change: Callable[[Any], nn.Module]) -> ReplayedFunction:
        """The same function over graphs that are changed."""
        made = ReplayedFunction(
            change(self.forward_graph),
            change(self.backward_graph),
            results=self.results,
            differentiable_results=self.differentiable_results,
            differentiable_inputs=self.differentiable_inputs,
        )
        made.before_backward = self.before_backward
        return made


def _nothing(graph: nn.Module, inputs: Sequence[Any]) -> None:
    pass


def call_function(function: ReplayedFunction, *inputs: Any) -> list[Tensor]:
    """What a node of a graph does that calls a custom function."""
    return function(*inputs)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: ReplayedFunction, *inputs: Any) -> tuple[Tensor, ...]:
        with _autocast_off():
            outputs = list(function.forward_graph(*inputs))
        results, read = outputs[: function.results], outputs[function.results :]
        if not all(isinstance(result, Tensor) for result in results):
            raise _malformed("a custom function's forward gives a result that is no tensor")
        ctx.function = function
        ctx.numbers = [None if isinstance(each, Tensor) else each for each in read]
        ctx.save_for_backward(*(each if isinstance(each, Tensor) else None for each in read))
        differentiable = set(function.differentiable_results)
        ctx.mark_non_differentiable(*(each for index, each in enumerate(results) if index not in differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise InvalidArgument(
                "a custom function was exported with its first derivative alone, and is differentiated twice",
                field="program",
                reason="GRADIENT_UNKNOWN",
            )
        function: ReplayedFunction = ctx.function
        needed, known = ctx.needs_input_grad[1:], set(function.differentiable_inputs)
        for index, needs in enumerate(needed):
            if needs and index not in known:
                raise InvalidArgument(
                    f"a custom function was exported without a gradient of its input {index}, which is asked for now",
                    field="program",
                    reason="GRADIENT_UNKNOWN",
                )
        pairs = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        read = [number if tensor is None else tensor for tensor, number in pairs]
        with _autocast_off():
            # Contiguous, as they were when the graph was made: it may view them in another shape.
            given = [gradients[index].contiguous() for index in function.differentiable_results]
            function.before_backward(function.backward_graph, (*given, *read))
            found = dict(zip(function.differentiable_inputs, function.backward_graph(*given, *read), strict=True))
        if not all(gradient is None or isinstance(gradient, Tensor) for gradient in found.values()):
            raise _malformed("a custom function's backward gives a gradient that is no tensor")
        return None, *(found.get(index) if needs else None for index, needs in enumerate(needed))


@contextmanager
def _autocast_off() -> Iterator[None]:
    if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
        yield
        return
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


def _malformed(message: str) -> InvalidArgument:
    return InvalidArgument(message, field="program", reason="PROGRAM_FAILED")
