"""The batch from which a graph is exported: flat, and with the dimension that may vary known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire.user_values import flatten, leaf_spec, normalize
from gradwire_proto.values import ROWS, Batch, Leaf, Structure, Value, map_leaves, unflatten


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

    def other_inputs(self) -> list[Any]:
        """Inputs that a module which takes the example should take as well: rows in reverse, floating point halved."""
        return [_other(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.inputs]

    def fixed(self) -> Example:
        """The example with every size fixed."""
        return self._with(self.inputs, self.targets, None)

    def input_specs(self) -> tuple[Leaf, ...]:
        """What a batch must bring as inputs."""
        return tuple(leaf_spec(leaf, ROWS if self.has_rows(leaf) else None) for leaf in self.inputs)

    def target_specs(self) -> tuple[Leaf, ...]:
        """What a batch must bring as targets."""
        return tuple(leaf_spec(leaf, ROWS if self.has_rows(leaf) else None) for leaf in self.targets)

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
