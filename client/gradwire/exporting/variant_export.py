"""One variant of a module: traced, encoded, checked against the module, with its loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gradwire.exporting import safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.finished_variant import Finished
from gradwire.exporting.graph_run import GraphRun
from gradwire.exporting.loss_export import export_loss, loss_leaf
from gradwire.exporting.loss_mapping import Loss
from gradwire.exporting.module_runs import ModuleRuns
from gradwire.exporting.module_snapshot import Snapshot
from gradwire.exporting.module_state import ModuleState
from gradwire.exporting.other_rows import RowsNotOpen
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.served_sizes import served_sizes
from gradwire.exporting.traced_graph import Constants, TracedGraph, trace_graph
from gradwire.exporting.tracing import explain
from gradwire.exporting.weight_export import LossWeight, export_weight
from gradwire.user_values import call_with
from gradwire_proto.errors import ExportError, GradwireError
from gradwire_proto.values import GraphInput, Variant

_OPEN_SIZES_MATTER = {"OPERATOR_NOT_ALLOWED", "EXPORT_FAILED", "EXPORT_MISMATCH", "EXPORT_CUSTOM_FUNCTION"}
"""Reasons that may be due to a size's being open: with that size fixed, the module may well be exported."""


@dataclass(frozen=True, kw_only=True)
class VariantExport:
    """Exports the module in the mode in which it is. The caller preserves it.

    loss: None where there is none, or the batch brings no targets for it. constants: those that the program has.
    snapshot: the module and the loss, as they are before each run. precision: at which the variant will run.
    loss_weight: what rows weigh in the loss, if given.
    """

    module: nn.Module
    loss: Loss | None
    state: ModuleState
    training: bool
    name: str
    constants: Mapping[str, Tensor]
    snapshot: Snapshot
    precision: str
    loss_weight: LossWeight | None = None

    def finish(self, example: Example) -> Finished:
        """The variant, with the rows and other sizes left open where the module lets them vary."""
        enlarged = example.enlarged()
        tries = [] if example.rows is None else [True, False] if enlarged.has_lengths else [False]
        for lengths in tries:
            try:
                found = self._attempt(enlarged, lengths=lengths)
                if enlarged is not example and not found.serves_one_row:
                    # With one row the module does something else.
                    break
                return found
            except GradwireError as error:
                if lengths and error.reason in _OPEN_SIZES_MATTER:
                    continue
                # Two rows may fail where the one that was given does not.
                if error.reason != "EXAMPLE_FAILED" or enlarged is example:
                    raise
                break
            except RowsNotOpen:
                break
            except Exception as error:  # torch.export raises whatever the sizes' being open led to
                reason = error
                del error
                self._raise_if_hopeless(reason, example)
        try:
            return self._attempt(example.fixed(), lengths=False)
        except GradwireError:
            raise
        except Exception as error:
            self.run_module(example)
            raise explain(error, f"the module {type(self.module).__qualname__}") from error

    def _raise_if_hopeless(self, error: Exception, example: Example) -> None:
        """Data-dependent control flow fails with fixed sizes too: say so at once."""
        if "DataDependent" in type(error).__name__:
            self.run_module(example)
            raise explain(error, f"the module {type(self.module).__qualname__}") from error

    def run_module(self, example: Example) -> None:
        """Raise EXAMPLE_FAILED if the module itself fails on the example."""
        self._runs.check_example(example)

    @property
    def _runs(self) -> ModuleRuns:
        return ModuleRuns(
            module=self.module, loss=self.loss, state=self.state, snapshot=self.snapshot, precision=self.precision
        )

    def _attempt(self, example: Example, *, lengths: bool) -> Finished:
        trees: list[OutputTree] = []
        operators: dict[str, str] = {}
        constants = Constants(prefix=self._constant_prefix(), known=self.constants)
        graph = self._trace(example, trees, lengths=lengths, constants=constants, operators=operators)
        tree = trees[-1]
        changing = [self.state.by_name[name] for name in graph.written]
        before = self._runs.buffers()
        eager, left, differentiate = self._runs.watched(example, changing, trees)
        if trees[-1].structure != tree.structure:
            raise ExportError("the module nests its outputs in one way when exported and in another when run")
        found_loss = None if self.loss else loss_leaf(tree, eager.outputs)
        loss_graph = self._loss_graph(example, tree, eager, graph, constants, operators, lengths=lengths)
        weight_graph = None
        if self.loss is not None or found_loss is not None:
            weight_graph = self._weight_graph(example, graph, constants, operators, lengths=lengths)
        check = GraphRun(loss=self.loss, example=example, graph=graph, loss_graph=loss_graph)
        self._compare(check, eager, changing, before, differentiate_leaves=differentiate)
        rows, found = served_sizes(
            self._runs,
            check,
            changing,
            lengths=lengths,
            differentiate_leaves=differentiate,
            loss_weight=self.loss_weight,
            weight_graph=weight_graph,
        )
        return Finished(
            variant=Variant(
                name=self.name,
                training=self.training,
                graph=graph.graph,
                graph_inputs=graph.bindings,
                input_structure=example.input_structure,
                input_leaves=example.input_specs(found.places),
                output_structure=tree.structure,
                symbols=(*rows, *found.symbols),
                loss_graph=loss_graph.graph if loss_graph else None,
                loss_graph_inputs=loss_graph.bindings if loss_graph else (),
                target_structure=example.target_structure,
                target_leaves=example.target_specs(found.places),
                weight_graph=weight_graph.graph if weight_graph else None,
                weight_graph_inputs=weight_graph.bindings if weight_graph else (),
            ),
            output_tree=tree,
            example=example,
            operators=operators,
            constants=dict(constants.added),
            constant_specs=constants.specs(),
            loss_leaf=found_loss,
            outputs=tuple(eager.outputs),
            changing=tuple(changing),
            devices=self.snapshot.devices,
            left=left,
            precision=self.precision,
            may_train=self._runs.may_train(check, changing),
        )

    def _trace(
        self,
        example: Example,
        trees: list[OutputTree],
        *,
        lengths: bool,
        constants: Constants,
        operators: dict[str, str],
    ) -> TracedGraph:
        """The forward's graph. trees: takes how the outputs are nested."""
        places = example.tensor_leaves

        def flat_forward(*tensors: Tensor) -> Sequence[Any]:
            leaves = list(example.inputs)
            for index, tensor in zip(places, tensors, strict=True):
                leaves[index] = tensor
            tree, flat = OutputTree.of(call_with(self.module, example.input_structure, leaves))
            trees.append(tree)
            return tuple(flat)

        leaves = [
            (
                GraphInput("input", index),
                example.inputs[index],
                example.openings(example.inputs[index], lengths=lengths),
            )
            for index in places
        ]
        with self._runs.rewound():
            return trace_graph(
                flat_forward,
                self.module,
                leaves,
                state=self.state.by_name,
                constants=constants,
                operators=operators,
                subject="the forward",
                restore=self.snapshot.restore,
                precision=self.precision,
            )

    def _loss_graph(
        self,
        example: Example,
        tree: OutputTree,
        eager: safety_net.Run,
        graph: TracedGraph,
        constants: Constants,
        operators: dict[str, str],
        *,
        lengths: bool,
    ) -> TracedGraph | None:
        if self.loss is None:
            return None
        return export_loss(
            self.loss,
            example,
            tree,
            eager.outputs,
            graph,
            lengths=lengths,
            constants=constants,
            operators=operators,
            trained=self._trained(graph),
            restore=self.snapshot.restore,
            precision=self.precision,
        )

    def _weight_graph(
        self,
        example: Example,
        graph: TracedGraph,
        constants: Constants,
        operators: dict[str, str],
        *,
        lengths: bool,
    ) -> TracedGraph | None:
        if self.loss_weight is None:
            return None
        return export_weight(
            self.loss_weight,
            example,
            takes_targets=self.loss is not None,
            lengths=lengths,
            constants=constants,
            operators=operators,
            trained=self._trained(graph),
        )

    def _compare(
        self,
        check: GraphRun,
        eager: safety_net.Run,
        changing: list[Tensor],
        before: Mapping[str, Tensor],
        *,
        differentiate_leaves: bool,
    ) -> None:
        """Check that the graph gives what the module does. before: the buffers before a run."""
        ours = self._runs.of_graph(check, changing, differentiate_leaves=differentiate_leaves)
        safety_net.compare(eager, ours, before)
        if check.has_functions and differentiate_leaves:
            # A function may ask which of its inputs need gradients: in training the leaves do not.
            without = self._runs.without_leaves(check.example, changing)
            safety_net.compare(without, self._runs.of_graph(check, changing, differentiate_leaves=False), before)

    def _trained(self, graph: TracedGraph) -> Mapping[str, Tensor]:
        """The tensors that change in training: to close over one would fix its value."""
        return {**self.state.trainable, **{name: self.state.by_name[name] for name in graph.written}}

    def _constant_prefix(self) -> str:
        prefix = f"constant.{self.name}."
        while any(name.startswith(prefix) for name in self.state.by_name):
            prefix = f"_{prefix}"
        return prefix
