"""How large a graph's results become, found on tensors without memory before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gradwire_proto.errors import InvalidArgument, ResourceExhausted

_META = torch.device("meta")


def check_sizes(module: fx.GraphModule, inputs: Sequence[Any], tensor_bytes: int, field: str) -> None:
    """Raise ResourceExhausted TENSOR_TOO_LARGE if a node's result has more than `tensor_bytes` bytes.

    inputs: what the graph takes, tensors on the meta device. Where a size depends on data, the check ends.
    """
    with torch.no_grad():
        try:
            _MeasuredRun(module, tensor_bytes, field).run(*inputs)
        except (NotImplementedError, _DependsOnData):
            return


class _DependsOnData(Exception):
    """A result's size is not known before the data is."""


class _MeasuredRun(fx.Interpreter):
    """Runs a graph on meta tensors and looks at every result."""

    def __init__(self, module: fx.GraphModule, tensor_bytes: int, field: str) -> None:
        super().__init__(module, garbage_collect_values=True)
        self._tensor_bytes = tensor_bytes
        self._field = field

    def run_node(self, n: fx.Node) -> Any:
        self._current = n
        result = super().run_node(n)
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor) and item.numel() * item.element_size() > self._tensor_bytes:
                raise ResourceExhausted(
                    f"{n.meta.get('operator', n.op)} makes a tensor {_shape(item)} of"
                    f" {item.numel() * item.element_size()} bytes; the limit `tensor_bytes` is {self._tensor_bytes}",
                    field=self._field,
                    reason="TENSOR_TOO_LARGE",
                )
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._current.meta.get("operator") == "aten.batch_norm.default":
            # Its replacement may talk to other ranks.
            target = torch.ops.aten.batch_norm.default
        args, kwargs = fx.node.map_aggregate((args, kwargs), _to_meta)  # type: ignore[misc]
        try:
            return target(*args, **kwargs)
        except (InvalidArgument, ResourceExhausted, NotImplementedError):
            raise
        except Exception as error:
            if _needs_data(error):
                raise _DependsOnData from error
            raise InvalidArgument(
                f"{self._current.meta.get('operator')} refuses its arguments: {str(error).splitlines()[0][:300]}",
                field=self._field,
                reason="GRAPH_FAILS",
            ) from error


def _to_meta(value: Any) -> Any:
    return _META if isinstance(value, torch.device) else value


def _needs_data(error: Exception) -> bool:
    text = str(error)
    return any(word in text for word in ("meta tensor", "Meta", "meta", "data-dependent", "item()"))


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
