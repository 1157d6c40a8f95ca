"""What the rows of a batch weigh in its loss, as the user's function of the batch says, as a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradwire.exporting import safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.traced_graph import Constants, TracedGraph, trace_graph
from gradwire.exporting.tracing import explain
from gradwire_proto.errors import ExportError, GradwireError
from gradwire_proto.values import GraphInput, unflatten

LossWeight = Callable[..., Tensor]
"""loss_weight(inputs), or loss_weight(inputs, targets) where the loss takes targets."""


def export_weight(
    loss_weight: LossWeight,
    example: Example,
    *,
    takes_targets: bool,
    lengths: bool,
    constants: Constants,
    operators: dict[str, str],
    trained: Mapping[str, Tensor],
) -> TracedGraph:
    """The graph of `loss_weight`, over the leaves of the example's inputs and targets.

    lengths: whether sizes besides rows may vary. trained: the module's tensors, which it must not read: it is a
    function of the batch alone.
    Raises ExportError LOSS_WEIGHT_NOT_SCALAR where it gives no scalar tensor, and as other exports do.
    """
    inputs, targets = list(example.inputs), list(example.targets) if takes_targets else []
    leaves = [
        (GraphInput(kind, index), leaf, example.openings(leaf, lengths=lengths))
        for kind, values in (("input", inputs), ("target", targets))
        for index, leaf in enumerate(values)
        if isinstance(leaf, Tensor)
    ]
    places = [(inputs if binding.kind == "input" else targets, int(binding.key)) for binding, _, _ in leaves]

    def flat_weight(*tensors: Tensor) -> Sequence[Any]:
        for (values, index), tensor in zip(places, tensors, strict=True):
            values[index] = tensor
        return (_weight(loss_weight, example, inputs, targets, takes_targets=takes_targets),)

    try:
        return trace_graph(
            flat_weight,
            None,
            leaves,
            state={},
            constants=constants,
            operators=operators,
            subject="loss_weight",
            trained=trained,
        )
    except GradwireError:
        raise
    except Exception as error:
        if example.rows is not None:
            # Perhaps with fixed sizes.
            raise
        raise explain(error, "loss_weight") from error


def weight_agrees(loss_weight: LossWeight, graph: TracedGraph, example: Example, *, takes_targets: bool) -> bool:
    """Whether the graph gives what `loss_weight` does on an example of other sizes; so it does where both fail."""
    inputs, targets = list(example.inputs), list(example.targets)
    given = [(inputs if leaf.kind == "input" else targets)[int(leaf.key)] for leaf in graph.leaves]
    results: list[Tensor | None] = []
    for run in (
        lambda: _weight(loss_weight, example, inputs, targets, takes_targets=takes_targets),
        lambda: graph(given)[0],
    ):
        try:
            results.append(run())
        except Exception:  # whatever the user's own function raises
            results.append(None)
    return safety_net.agree(results[:1], results[1:])


def _weight(
    loss_weight: LossWeight, example: Example, inputs: list[Any], targets: list[Any], *, takes_targets: bool
) -> Tensor:
    batch = [unflatten(example.input_structure, inputs)]
    if takes_targets:
        batch.append(unflatten(example.target_structure, targets))
    with torch.no_grad():
        return _as_weight(loss_weight(*batch))


def _as_weight(weight: Any) -> Tensor:
    if not isinstance(weight, Tensor) or weight.numel() != 1 or weight.is_complex():
        found = (
            f"{weight.dtype} of shape {list(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__qualname__
        )
        raise ExportError(
            f"loss_weight must give what the rows weigh as one real number in a tensor, got {found}",
            field="loss_weight",
            reason="LOSS_WEIGHT_NOT_SCALAR",
        )
    return weight.reshape(())
