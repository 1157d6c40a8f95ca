"""How large a graph's results become, found on tensors without memory before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.function_replay import ReplayedFunction
from gradwire_proto.operators import AUTOCAST_REGION, COND, CUSTOM_FUNCTION, REGIONS, has_schema, resolve
from gradwire_workers.lifted_limits import are_lifted

_META = torch.device("meta")

UNKNOWN = object()
"""A result that depends on data, in place of a value."""

# What these make is as large as the sizes that stand in their arguments, whatever the rest of them is.
_SIZED = frozenset(
    (
        *("full", "zeros", "ones", "rand", "randn", "randint", "new_full", "new_zeros", "new_ones", "eye"),
        *("expand", "repeat", "tile", "broadcast_to"),
    )
)


def check_sizes(
    module: fx.GraphModule, inputs: Sequence[Any], tensor_bytes: int, field: str, *, casts: bool = False
) -> list[Any]:
    """Raise ResourceExhausted TENSOR_TOO_LARGE if a node's result has more than `tensor_bytes` bytes.

    inputs: what the graph takes, tensors on the meta device, or UNKNOWN. Returns the graph's outputs, likewise: a
    result that depends on data is UNKNOWN, and of what is made from it only the sizes are checked that the graph names.
    casts: whether the graph runs under autocast.
    """
    with torch.no_grad():
        return list(_MeasuredRun(module, tensor_bytes, field, has_cast=casts).run(*inputs))


class SizesChecked:
    """Sizes for which a graph is known to be small enough, and with them all that are no larger."""

    _MOST = 16

    def __init__(self) -> None:
        self._known: list[tuple[int, ...]] = []

    def cover(self, sizes: tuple[int, ...]) -> bool:
        """Whether each of the sizes is at most what was checked, for one check; or nothing is to be checked now."""
        return are_lifted() or any(
            len(known) == len(sizes) and all(size <= most for size, most in zip(sizes, known, strict=True))
            for known in self._known
        )

    def add(self, sizes: tuple[int, ...]) -> None:
        """The graph was checked for these sizes. Old ones are forgotten: they can be checked again."""
        if not are_lifted():
            self._known = [sizes, *self._known[: self._MOST - 1]]


class BackwardSizes:
    """Measures the backward of a custom function for what it takes, each time that this is larger than before.

    Ahead of time its sizes are not always known: those of a function's results may depend on data.
    """

    def __init__(self, tensor_bytes: int) -> None:
        self._tensor_bytes = tensor_bytes
        self._checked = SizesChecked()

    def __call__(self, graph: Any, inputs: Sequence[Any]) -> None:
        sizes = tuple([size for each in inputs if isinstance(each, Tensor) for size in each.shape])
        numbers = any(isinstance(each, (int, float)) for each in inputs)
        # Numbers that it takes may be sizes.
        if numbers or not self._checked.cover(sizes):
            on_meta = [torch.empty_like(x, device=_META) if isinstance(x, Tensor) else x for x in inputs]
            check_sizes(graph, on_meta, self._tensor_bytes, "the backward of a custom function")
            self._checked.add(sizes)


class _MeasuredRun(fx.Interpreter):
    """Runs a graph on meta tensors and looks at every result."""

    def __init__(self, module: fx.GraphModule, tensor_bytes: int, field: str, *, has_cast: bool = False) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._tensor_bytes = tensor_bytes
        self._field = field
        # Autocast knows no meta tensors: from the first such region on, types may differ from the real ones.
        self._has_cast = has_cast

    def run_node(self, n: fx.Node) -> Any:
        self._current = n
        result = super().run_node(n)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self._check(list(item.shape), item.numel() * item.element_size())
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        operator = self._current.meta.get("operator", "")
        args, kwargs = map_aggregate((args, kwargs), _to_meta)  # type: ignore[misc]
        try:
            if operator in REGIONS:
                return self._region(operator, args)
            if operator == COND:
                return self._either(*args[1:])
            if operator == CUSTOM_FUNCTION:
                return self._function(*args)
            if _holds_unknown((args, kwargs)):
                self._check_named_sizes(operator, args, kwargs)
                return UNKNOWN
            # Not the node's own function: checks of values need values, and batch norm's may talk to other ranks.
            run = resolve(operator) if has_schema(operator) else target
            try:
                return run(*args, **kwargs)
            except (RuntimeError, TypeError):
                if not self._has_cast:
                    raise
                # Perhaps for types that autocast makes one: the widest of them is as large as it gets.
                return run(*_widened(args), **_widened(kwargs))
        except (InvalidArgument, ResourceExhausted):
            raise
        except Exception as error:
            if self._has_cast or isinstance(error, NotImplementedError) or _needs_data(error):
                self._check_named_sizes(operator, args, kwargs)
                return UNKNOWN
            raise InvalidArgument(
                f"{operator} refuses its arguments: {str(error).splitlines()[0][:300] if str(error) else type(error)}",
                field=self._field,
                reason="GRAPH_FAILS",
            ) from error

    def _region(self, operator: str, arguments: tuple[Any, ...]) -> Any:
        self._has_cast = self._has_cast or operator == AUTOCAST_REGION
        position = next(index for index, each in enumerate(arguments) if isinstance(each, fx.GraphModule))
        return self._inner(arguments[position], arguments[position + 1 :])

    def _either(self, when_true: Any, when_false: Any, operands: Sequence[Any]) -> list[Any]:
        """Both branches are measured. A result that is not the same of both depends on data."""
        pairs = zip(*(self._inner(branch, operands) for branch in (when_true, when_false)), strict=True)
        return [one if _look_alike(one, other) else UNKNOWN for one, other in pairs]

    def _function(self, function: ReplayedFunction, *inputs: Any) -> list[Any]:
        """A custom function's results. Its backward is measured as well, for gradients as large as they are."""
        outputs = list(self._inner(function.forward_graph, inputs))
        results, read = outputs[: function.results], outputs[function.results :]
        gradients = [results[index] for index in function.differentiable_results]
        self._inner(function.backward_graph, (*gradients, *read))
        return results

    def _inner(self, module: Any, inputs: Sequence[Any]) -> Any:
        inner = _MeasuredRun(module, self._tensor_bytes, self._field, has_cast=self._has_cast)
        outputs = inner.run(*inputs)
        self._has_cast = inner._has_cast
        return outputs

    def _check_named_sizes(self, operator: str, args: Any, kwargs: Any) -> None:
        """What can be said of a result that was not computed: it has at least the numbers that its sizes name."""
        if not has_schema(operator) or operator.split(".")[1] not in _SIZED:
            return
        for argument in (*args, *kwargs.values()):
            sizes = [each for each in argument if isinstance(each, int)] if isinstance(argument, (list, tuple)) else []
            least = 1
            for size in sizes:
                least *= max(size, 1)
            if 0 not in sizes:
                self._check(sizes, least)

    def _check(self, shape: list[int], nbytes: int) -> None:
        if nbytes > self._tensor_bytes and not are_lifted():
            raise ResourceExhausted(
                f"{self._current.meta.get('operator', self._current.op)} makes a tensor {shape} of at least"
                f" {nbytes} bytes; the limit `tensor_bytes` is {self._tensor_bytes}",
                field=self._field,
                reason="TENSOR_TOO_LARGE",
            )


def _widened(arguments: Any) -> Any:
    def widen(value: Any) -> Any:
        is_narrow = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if is_narrow else value

    return map_aggregate(arguments, widen)


def _look_alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other) and not isinstance(one, Tensor) and one == other


def _to_meta(value: Any) -> Any:
    return _META if isinstance(value, torch.device) else value


def _holds_unknown(value: Any) -> bool:
    found = False

    def look(item: Any) -> Any:
        nonlocal found
        found = found or item is UNKNOWN
        return item

    map_aggregate(value, look)
    return found


def _needs_data(error: Exception) -> bool:
    text = str(error)
    return any(word in text for word in ("meta tensor", "Meta", "meta", "data-dependent", "item()"))
