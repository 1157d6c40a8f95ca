"""Keeps a variant's results below a limit, for every batch: its sizes are tried out before the graph runs on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.values import GraphInput, Leaf, TensorSpec, Variant
from gradwire_workers.lifted_limits import are_lifted
from gradwire_workers.programs.size_check import UNKNOWN, SizesChecked, check_sizes

_GROWTH = 4
"""Sizes are checked for this many times a batch's, so that the next batches need no check."""
_LEAST = 2
"""What symbols stand for before any batch is there: many graphs do not take a size of 1."""


class SizeGuard:
    """The sizes of one variant's graph, and of its loss and weight graphs, if it has them. `casts`: they run under
    autocast.

    Every method raises ResourceExhausted TENSOR_TOO_LARGE, and InvalidArgument where an operator refuses the sizes.
    """

    def __init__(
        self,
        variant: Variant,
        module: fx.GraphModule,
        loss: fx.GraphModule | None,
        weight: fx.GraphModule | None,
        tensors: Mapping[str, Tensor],
        tensor_bytes: int,
        *,
        casts: bool = False,
    ) -> None:
        self._variant = variant
        self._module = module
        self._loss = loss
        self._weight = weight
        self._tensors = tensors
        self._tensor_bytes = tensor_bytes
        self._casts = casts
        self._places = _places(variant.input_leaves)
        self._symbols_at = list(self._places.values())
        self._last: list[int] = []
        """Sizes of the batch that was checked last: most come with the same."""
        self._checked = SizesChecked()
        self._loss_checked = SizesChecked()
        self._weight_checked = SizesChecked()

    def check_smallest(self) -> None:
        """Checks the smallest batch of all."""
        self._check({symbol.name: self._bounded(symbol.name, max(symbol.min, _LEAST)) for symbol in self._symbols})

    def before_run(self, leaves: Sequence[Any]) -> None:
        """Checks a batch's input leaves, unless batches as large were checked before."""
        sizes = [leaves[leaf].size(dimension) for leaf, dimension in self._symbols_at]
        if sizes == self._last:
            return
        self._check_run(tuple(sizes))
        if not are_lifted():
            self._last = sizes

    def _check_run(self, sizes: tuple[int, ...]) -> None:
        if self._checked.cover(sizes):
            return
        found = dict(zip(self._places, sizes, strict=True))
        try:
            self._check({name: self._bounded(name, size * _GROWTH) for name, size in found.items()})
        except (ResourceExhausted, InvalidArgument):
            # Too large ahead of time; this batch may do.
            self._check(found)

    def before_loss(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """Checks outputs and target leaves, unless ones as large were checked before."""
        if not self._loss_checked.cover(_all_sizes((*outputs, *targets))):
            self._check_loss(*([_on_meta(each) for each in leaves] for leaves in (outputs, targets)))

    def before_weight(self, inputs: Sequence[Any], targets: Sequence[Any]) -> None:
        """Checks input and target leaves for the weight graph, unless ones as large were checked before."""
        sizes = _all_sizes((*inputs, *targets))
        if self._weight is None or self._weight_checked.cover(sizes):
            return
        on_meta = {"input": [_on_meta(each) for each in inputs], "target": [_on_meta(each) for each in targets]}
        given = self._bind(self._variant.weight_graph_inputs, on_meta)
        check_sizes(self._weight, given, self._tensor_bytes, self._field)
        self._weight_checked.add(sizes)

    @property
    def _symbols(self) -> Sequence[Any]:
        return self._variant.symbols

    def _bounded(self, name: str, size: int) -> int:
        most = next((symbol.max for symbol in self._symbols if symbol.name == name), None)
        return size if most is None else min(size, most)

    def _check(self, sizes: Mapping[str, int]) -> None:
        inputs = [_of_spec(leaf, sizes) for leaf in self._variant.input_leaves]
        given = self._bind(self._variant.graph_inputs, {"input": inputs})
        outputs = check_sizes(self._module, given, self._tensor_bytes, self._field, casts=self._casts)
        if self._loss is not None:
            smallest = {symbol.name: max(symbol.min, _LEAST) for symbol in self._symbols}
            self._check_loss(outputs, [_of_spec(leaf, {**smallest, **sizes}) for leaf in self._variant.target_leaves])
        self._checked.add(tuple([sizes[name] for name in self._places]))

    def _check_loss(self, outputs: Sequence[Any], targets: Sequence[Any]) -> None:
        if self._loss is None:
            return
        given = self._bind(self._variant.loss_graph_inputs, {"output": outputs, "target": targets})
        check_sizes(self._loss, given, self._tensor_bytes, self._field, casts=self._casts)
        if not any(each is UNKNOWN for each in outputs):
            self._loss_checked.add(_all_sizes((*outputs, *targets)))

    def _bind(self, inputs: Sequence[GraphInput], leaves: Mapping[str, Sequence[Any]]) -> list[Any]:
        return [
            _on_meta(self._tensors[str(each.key)]) if each.kind == "tensor" else leaves[each.kind][int(each.key)]
            for each in inputs
        ]

    @property
    def _field(self) -> str:
        return f"variant {self._variant.name!r}"


def _places(leaves: Sequence[Leaf]) -> dict[str, tuple[int, int]]:
    """(leaf, dimension) at which each symbol's size is found."""
    places: dict[str, tuple[int, int]] = {}
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, TensorSpec):
            for dimension, size in enumerate(leaf.shape):
                if isinstance(size, str):
                    places.setdefault(size, (index, dimension))
    return places


def _of_spec(leaf: Leaf, sizes: Mapping[str, int]) -> Any:
    if not isinstance(leaf, TensorSpec):
        return leaf.value
    shape = [sizes[size] if isinstance(size, str) else size for size in leaf.shape]
    return torch.empty(shape, dtype=getattr(torch, leaf.dtype), device="meta")


def _on_meta(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _all_sizes(leaves: Sequence[Any]) -> tuple[int, ...]:
    return tuple([size for leaf in leaves if isinstance(leaf, Tensor) for size in leaf.shape])
