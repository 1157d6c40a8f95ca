"""The batch from which a graph is exported: flat, and with the dimension that may vary known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire.exporting.tracing import OPEN_IF_POSSIBLE, ROWS_OPEN, Openings
from gradwire.user_values import flatten, leaf_spec, normalize
from gradwire_proto.values import ROWS, Batch, Leaf, Structure, Value, map_leaves, unflatten

Place = tuple[str, int, int]
"""A dimension: ("input" or "target", leaf, dimension)."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Flat inputs and targets. `rows`: how many rows the batch has; None where no dimension may vary."""

    inputs: list[Any]
    input_structure: Structure
    targets: list[Any]
    target_structure: Structure
    rows: int | None

    @property
    def batch(self) -> Batch:
        """The example, nested."""
        return Batch(unflatten(self.input_structure, self.inputs), unflatten(self.target_structure, self.targets))

    @property
    def tensor_leaves(self) -> list[int]:
        """The inputs that are tensors."""
        return [index for index, leaf in enumerate(self.inputs) if isinstance(leaf, Tensor)]

    def has_rows(self, leaf: Any) -> bool:
        """Whether dimension 0 of a leaf is the batch's rows."""
        return self.rows is not None and isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.rows

    def enlarged(self) -> Example:
        """The example with at least two rows: a size of one cannot be left open. One row is repeated."""
        if self.rows != 1:
            return self
        return self._with([self._twice(x) for x in self.inputs], [self._twice(x) for x in self.targets], 2)

    def with_rows(self, count: int) -> Example:
        """So many of the example's rows, the first ones; again from the first where it has fewer."""
        chosen = torch.arange(count) % (self.rows or 1)
        inputs, targets = (
            [x[chosen.to(x.device)] if self.has_rows(x) else x for x in leaves]
            for leaves in (self.inputs, self.targets)
        )
        return self._with(inputs, targets, count)

    def with_sizes(self, places: Mapping[Place, str], sizes: Mapping[str, int]) -> Example:
        """With other sizes at some places: the example's content from its start, and again where it ends.

        places: the symbol at each. sizes: of each symbol.
        """
        inputs, targets = list(self.inputs), list(self.targets)
        for (kind, leaf, dimension), symbol in places.items():
            leaves = inputs if kind == "input" else targets
            tensor = leaves[leaf]
            chosen = torch.arange(sizes[symbol], device=tensor.device) % tensor.shape[dimension]
            leaves[leaf] = tensor.index_select(dimension, chosen)
        return self._with(inputs, targets, self.rows)

    @property
    def has_lengths(self) -> bool:
        """Whether an input has a dimension besides rows that could vary."""
        return any(len(self.openings(leaf, lengths=True)) > self.has_rows(leaf) for leaf in self.inputs)

    def openings(self, leaf: Any, *, lengths: bool) -> Openings:
        """The dimensions of a leaf that an export leaves open: rows, and with `lengths` whichever others it can.

        Sizes of one, and of none, are fixed: torch.export takes neither for the example of another size.
        """
        if self.rows is None or not isinstance(leaf, Tensor):
            return {}
        rows = {0: ROWS_OPEN} if self.has_rows(leaf) else {}
        others = {i: OPEN_IF_POSSIBLE for i, size in enumerate(leaf.shape) if lengths and i not in rows and size > 1}
        return {**rows, **others}

    def other_inputs(self) -> list[Any]:
        """Inputs that a module which takes the example should take as well: rows in reverse, floating point halved."""
        return [_other(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.inputs]

    def fixed(self) -> Example:
        """The example with every size fixed."""
        return self._with(self.inputs, self.targets, None)

    def input_specs(self, places: Mapping[Place, str]) -> tuple[Leaf, ...]:
        """What a batch must bring as inputs. places: the symbols besides rows."""
        return self._specs("input", self.inputs, places)

    def target_specs(self, places: Mapping[Place, str]) -> tuple[Leaf, ...]:
        """What a batch must bring as targets."""
        return self._specs("target", self.targets, places)

    def _specs(self, kind: str, leaves: Sequence[Any], places: Mapping[Place, str]) -> tuple[Leaf, ...]:
        symbols: list[dict[int, str]] = [{0: ROWS} if self.has_rows(leaf) else {} for leaf in leaves]
        for (its_kind, leaf, dimension), symbol in places.items():
            if its_kind == kind:
                symbols[leaf][dimension] = symbol
        return tuple(leaf_spec(leaf, its) for leaf, its in zip(leaves, symbols, strict=True))

    def _twice(self, leaf: Any) -> Any:
        return torch.cat((leaf, leaf)) if self.has_rows(leaf) else leaf

    def _with(self, inputs: list[Any], targets: list[Any], rows: int | None) -> Example:
        return Example(
            inputs=inputs,
            input_structure=self.input_structure,
            targets=targets,
            target_structure=self.target_structure,
            rows=rows,
        )


def _other(leaf: Tensor) -> Tensor:
    leaf = leaf.flip(0) if leaf.dim() else leaf
    return leaf * 0.5 if leaf.is_floating_point() or leaf.is_complex() else leaf


def as_example(inputs: Any, targets: Any) -> Example:
    """The example of a user's batch. Its rows are dimension 0 of the first input that has one.

    Raises InvalidArgument for values that have no place in a batch.
    """
    inputs, targets = normalize(inputs, "example.inputs"), normalize(targets, "example.targets")
    input_structure, input_leaves = flatten(_contiguous(inputs))
    target_structure, target_leaves = flatten(_contiguous(targets))
    rows = next((len(leaf) for leaf in input_leaves if isinstance(leaf, Tensor) and leaf.dim() > 0), None)
    return Example(
        inputs=input_leaves,
        input_structure=input_structure,
        targets=target_leaves,
        target_structure=target_structure,
        rows=rows or None,
    )


def _contiguous(value: Value) -> Value:
    # As they arrive on the service.
    return map_leaves(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, value)
