"""The sizes that a variant leaves open: its graphs say which could vary, and runs at others whether they may."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gradwire.exporting.example import Example
from gradwire.exporting.graph_run import GraphRun
from gradwire.exporting.lengths import Lengths, LengthSearch
from gradwire.exporting.module_runs import ModuleRuns
from gradwire.exporting.other_lengths import OtherLengths
from gradwire.exporting.other_rows import OtherRows
from gradwire.exporting.traced_graph import TracedGraph
from gradwire.exporting.weight_export import LossWeight, weight_agrees
from gradwire_proto.values import ROWS, Symbol


def served_sizes(
    runs: ModuleRuns,
    check: GraphRun,
    changing: list[Tensor],
    *,
    lengths: bool,
    differentiate_leaves: bool,
    loss_weight: LossWeight | None,
    weight_graph: TracedGraph | None,
) -> tuple[tuple[Symbol, ...], Lengths]:
    """(the rows, if they vary; the other sizes that do, none of them without `lengths`).

    changing: the module's tensors that a forward changes. differentiate_leaves: compare gradients of inputs too.
    Raises RowsNotOpen and LengthsNotOpen where the graphs do not serve what they should.
    """
    others = OtherRows(
        eager=runs.forward,
        check=check,
        trainable=runs.state.trainable,
        buffers=runs.buffers,
        devices=runs.snapshot.devices,
        precision=runs.precision,
        rewound=lambda: runs.rewound(changing),
    )
    rows = () if check.example.rows is None else (Symbol(ROWS, min=others.smallest(check.example)),)
    if not lengths:
        return rows, Lengths()
    weighs_the_same = _weighs_the_same(loss_weight, weight_graph, takes_targets=runs.loss is not None)
    other_lengths = OtherLengths(
        runs=others, differentiate_leaves=differentiate_leaves, weighs_the_same=weighs_the_same
    )
    return rows, other_lengths.served(_search(check, weight_graph).find())


def _search(check: GraphRun, weight_graph: TracedGraph | None) -> LengthSearch:
    compared = []
    if check.loss is not None and check.loss_graph is None:
        compared = check.loss.compared_sizes(check.graph.sizes.outputs[0] or (), check.example.targets[0].dim())
    return LengthSearch(
        example=check.example,
        forward=check.graph.sizes,
        compared=compared,
        others=[(graph.sizes, graph.leaves) for graph in (check.loss_graph, weight_graph) if graph is not None],
    )


def _weighs_the_same(
    loss_weight: LossWeight | None, graph: TracedGraph | None, *, takes_targets: bool
) -> Callable[[Example], bool]:
    if loss_weight is None or graph is None:
        return lambda example: True
    return lambda example: weight_agrees(loss_weight, graph, example, takes_targets=takes_targets)
