"""Runs a variant's raw graphs here, as the service runs them there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from gradwire.exporting.example import Example
from gradwire.exporting.loss_mapping import Loss
from gradwire.exporting.traced_graph import TracedGraph
from gradwire_proto.errors import ExportError


@dataclass(frozen=True, kw_only=True)
class GraphRun:
    """A variant's raw graphs on an example."""

    loss: Loss | None
    example: Example
    graph: TracedGraph
    loss_graph: TracedGraph | None

    @property
    def has_functions(self) -> bool:
        """Whether functions with a backward of their own are in the graph, or in the loss's."""
        return any(graph.has_functions for graph in (self.graph, self.loss_graph) if graph is not None)

    def with_example(self, example: Example) -> GraphRun:
        """The same graphs on another example."""
        return replace(self, example=example)

    def forward(self, leaves: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
        """(flat outputs, loss) for input leaves."""
        outputs = self.graph([leaves[index] for index in self.example.tensor_leaves])
        if self.loss is None:
            return outputs, None
        targets = self.example.targets
        if self.loss_graph is None:
            return outputs, as_scalar(self.loss.function(outputs[0], targets[0]))
        values: dict[str, Callable[[int], Any]] = {"output": outputs.__getitem__, "target": targets.__getitem__}
        leaves = [values[each.kind](int(each.key)) for each in self.loss_graph.bindings if each.kind in values]
        return outputs, self.loss_graph(leaves)[0]


def as_scalar(loss: Any) -> Tensor:
    """A loss as a scalar. Raises ExportError LOSS_NOT_SCALAR for what is not one floating point number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        found = f"{loss.dtype} of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__qualname__
        raise ExportError(
            f"the loss must be one floating point number, got {found}", field="loss", reason="LOSS_NOT_SCALAR"
        )
    return loss if loss.dim() == 0 else loss.reshape(())
