"""One variant of a module: traced, encoded, checked against the module, with its loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.exporting import python_state, safety_net
from gradwire.exporting.example import Example
from gradwire.exporting.graph_run import GraphRun, as_scalar
from gradwire.exporting.lengths import Lengths, LengthSearch, output_openings, rows_symbol
from gradwire.exporting.loss_mapping import Loss
from gradwire.exporting.module_snapshot import Snapshot, rewound
from gradwire.exporting.module_state import ModuleState, buffer_values, thawed
from gradwire.exporting.other_lengths import OtherLengths
from gradwire.exporting.other_rows import OtherRows, RowsNotOpen
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.random_state import seed
from gradwire.exporting.traced_graph import Constants, TracedGraph, trace_graph
from gradwire.exporting.tracing import ROWS_OPEN, Openings, explain, quiet
from gradwire.exporting.weight_export import LossWeight, export_weight, weight_agrees
from gradwire.user_values import call_with
from gradwire_proto.autocast import autocast
from gradwire_proto.errors import ExportError, GradwireError
from gradwire_proto.values import ROWS, GraphInput, StateTensor, Symbol, Variant, unflatten

_OPEN_SIZES_MATTER = {"OPERATOR_NOT_ALLOWED", "EXPORT_FAILED", "EXPORT_MISMATCH", "EXPORT_CUSTOM_FUNCTION"}
"""Reasons that may be due to a size's being open: with that size fixed, the module may well be exported."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A variant that computes what the module does.

    loss_leaf: the output that is the loss, where the module returns it. outputs: what the module gave on the example.
    changing: the module's tensors that a forward changes. devices: the CUDA devices that it uses.
    left: the attributes that a forward changes, on which nothing depends. may_train: the frozen parameters whose
    gradient the graph gives all the same.
    """

    variant: Variant
    output_tree: OutputTree
    example: Example
    operators: Mapping[str, str]
    constants: Mapping[str, Tensor]
    constant_specs: tuple[StateTensor, ...]
    loss_leaf: int | None
    outputs: tuple[Any, ...]
    changing: tuple[Tensor, ...]
    devices: frozenset[int]
    left: frozenset[str]
    precision: str
    may_train: frozenset[str]

    @property
    def serves_one_row(self) -> bool:
        """Whether a batch may have a single row."""
        return all(symbol.min <= 1 for symbol in self.variant.symbols if symbol.name == ROWS)

    def agrees_with(self, module: nn.Module) -> bool:
        """Whether the module, in the mode in which it is now, gives the outputs that it gave when this was exported."""
        seed(self.devices)
        with torch.no_grad(), quiet(), autocast(self.precision), rewound(self.changing):
            inputs = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in self.example.inputs]
            tree, outputs = OutputTree.of(call_with(module, self.example.input_structure, inputs))
        return tree.structure == self.output_tree.structure and safety_net.agree(self.outputs, outputs)


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
        with self._rewound(self.state.by_name.values()):
            forward = self._eager(example, [])
            safety_net.run(
                forward, example.inputs, {}, subject="the module", differentiate=False, precision=self.precision
            )

    @contextmanager
    def _rewound(self, tensors: Iterable[Tensor]) -> Iterator[None]:
        """After, the module and the loss are as before, parameters among `tensors` too."""
        try:
            with rewound(tensors):
                yield
        finally:
            self.snapshot.restore()

    def _attempt(self, example: Example, *, lengths: bool) -> Finished:
        trees: list[OutputTree] = []
        tensor_leaves = [index for index, leaf in enumerate(example.inputs) if isinstance(leaf, Tensor)]

        def flat_forward(*tensors: Tensor) -> Sequence[Any]:
            leaves = list(example.inputs)
            for index, tensor in zip(tensor_leaves, tensors, strict=True):
                leaves[index] = tensor
            tree, flat = OutputTree.of(call_with(self.module, example.input_structure, leaves))
            trees.append(tree)
            return tuple(flat)

        operators: dict[str, str] = {}
        constants = Constants(prefix=self._constant_prefix(), known=self.constants)
        leaves = [
            (GraphInput("input", i), example.inputs[i], example.openings(example.inputs[i], lengths=lengths))
            for i in tensor_leaves
        ]
        with self._rewound(()):
            graph = trace_graph(
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
        tree = trees[-1]
        changing = [self.state.by_name[name] for name in graph.written]
        before = buffer_values(self.module)
        eager, left, differentiate = self._compare_runs(example, trees, changing)
        if trees[-1].structure != tree.structure:
            raise ExportError("the module nests its outputs in one way when exported and in another when run")
        loss_leaf = None if self.loss else _loss_leaf(tree, eager.outputs)
        loss_graph = self._loss_graph(example, tree, eager, graph, constants, operators, lengths=lengths)
        weight_graph = None
        if self.loss_weight is not None and (self.loss is not None or loss_leaf is not None):
            weight_graph = export_weight(
                self.loss_weight,
                example,
                takes_targets=self.loss is not None,
                lengths=lengths,
                constants=constants,
                operators=operators,
                trained=self._trained(graph),
            )
        check = GraphRun(
            loss=self.loss, example=example, graph=graph, loss_graph=loss_graph, tensor_leaves=tensor_leaves
        )
        safety_net.compare(eager, self._run_graph(check, changing, differentiate_leaves=differentiate), before)
        if check.has_functions and differentiate:
            # A function may ask which of its inputs need gradients: in training the leaves do not.
            without, _ = self._run_watched(example, trees, changing, differentiate_leaves=False)
            safety_net.compare(without, self._run_graph(check, changing, differentiate_leaves=False), before)
        others = OtherRows(
            eager=lambda other: self._eager(other, []),
            check=check,
            trainable=self.state.trainable,
            buffers=self._buffers,
            devices=self.snapshot.devices,
            precision=self.precision,
            rewound=lambda: self._rewound(changing),
        )
        rows = () if example.rows is None else (Symbol(ROWS, min=others.smallest(example)),)
        found = self._lengths(others, weight_graph, differentiate_leaves=differentiate) if lengths else Lengths()
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
            loss_leaf=loss_leaf,
            outputs=tuple(eager.outputs),
            changing=tuple(changing),
            devices=self.snapshot.devices,
            left=left,
            precision=self.precision,
            may_train=self._may_train(check, changing),
        )

    def _lengths(self, others: OtherRows, weight_graph: TracedGraph | None, *, differentiate_leaves: bool) -> Lengths:
        """The sizes besides rows that may vary: the graphs say which could, and runs at others whether they do."""
        check, loss, loss_weight = others.check, self.loss, self.loss_weight
        compared = []
        if loss is not None and check.loss_graph is None:
            compared = loss.compared_sizes(check.graph.sizes.outputs[0] or (), check.example.targets[0].dim())

        def weighs_the_same(example: Example) -> bool:
            if weight_graph is None or loss_weight is None:
                return True
            return weight_agrees(loss_weight, weight_graph, example, takes_targets=loss is not None)

        search = LengthSearch(
            example=check.example,
            forward=check.graph.sizes,
            tensor_leaves=check.tensor_leaves,
            compared=compared,
            others=[(graph.sizes, graph.leaves) for graph in (check.loss_graph, weight_graph) if graph is not None],
        )
        runs = OtherLengths(runs=others, differentiate_leaves=differentiate_leaves, weighs_the_same=weighs_the_same)
        return runs.served(search.find())

    def _may_train(self, check: GraphRun, changing: list[Tensor]) -> frozenset[str]:
        """The frozen parameters whose gradient is the graph's too, once they are unfrozen.

        A graph need not give it: a function that brings its own backward is traced for what needed gradients then.
        """
        frozen = self.state.frozen
        if not frozen:
            return frozenset()
        runs = []
        try:
            with thawed(frozen):
                for forward in (self._eager(check.example, []), check.forward):
                    with self._rewound(changing):
                        runs.append(
                            safety_net.run(
                                forward,
                                check.example.inputs,
                                {**self.state.trainable, **frozen},
                                subject="the module with its frozen parameters unfrozen",
                                differentiate_leaves=False,
                                precision=self.precision,
                            )
                        )
        except GradwireError:
            # It cannot even be run so; as it is, it can.
            return frozenset()
        return safety_net.same_gradients(*runs) & frozen.keys()

    def _buffers(self) -> Mapping[str, Tensor]:
        return buffer_values(self.module)

    def _compare_runs(
        self, example: Example, trees: list[OutputTree], changing: list[Tensor]
    ) -> tuple[safety_net.Run, frozenset[str], bool]:
        """(what the module gives, the attributes that it changes idly, whether its inputs can have gradients)."""
        try:
            return *self._run_watched(example, trees, changing, differentiate_leaves=True), True
        except ExportError as error:
            if error.reason != "EXAMPLE_FAILED":
                raise
        # Some operators do not differentiate every input, such as targets among them.
        return *self._run_watched(example, trees, changing, differentiate_leaves=False), False

    def _run_graph(self, check: GraphRun, changing: list[Tensor], *, differentiate_leaves: bool) -> safety_net.Run:
        """What the exported graph gives."""
        with self._rewound(changing):
            return safety_net.run(
                check.forward,
                check.example.inputs,
                self.state.trainable,
                subject="the exported graph",
                differentiate_leaves=differentiate_leaves,
                buffers=self._buffers,
                precision=self.precision,
            )

    def _run_watched(
        self, example: Example, trees: list[OutputTree], changing: list[Tensor], *, differentiate_leaves: bool
    ) -> tuple[safety_net.Run, frozenset[str]]:
        forward = self._eager(example, trees)

        def once(inputs: Sequence[Any]) -> safety_net.Run:
            with rewound(changing):
                return safety_net.run(
                    forward,
                    inputs,
                    self.state.trainable,
                    subject="the module",
                    differentiate_leaves=differentiate_leaves,
                    buffers=self._buffers,
                    precision=self.precision,
                )

        with self._rewound(()):
            first = once(example.inputs)
            left = python_state.refuse_dependence(
                self.snapshot, first, lambda: once(example.inputs), lambda: once(example.other_inputs())
            )
            return first, left

    def _constant_prefix(self) -> str:
        prefix = f"constant.{self.name}."
        while any(name.startswith(prefix) for name in self.state.by_name):
            prefix = f"_{prefix}"
        return prefix

    def _eager(self, example: Example, trees: list[OutputTree]) -> safety_net.Forward:
        def forward(leaves: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
            output = call_with(self.module, example.input_structure, list(leaves))
            tree, flat = OutputTree.of(output)
            trees.append(tree)
            if self.loss is None:
                return flat, None
            targets = unflatten(example.target_structure, example.targets)
            return flat, as_scalar(self.loss.function(output, targets))

        return forward

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
        if self.loss is None or self.loss.fits(eager.outputs, example.targets):
            return None
        loss, outputs, targets = self.loss, list(eager.outputs), list(example.targets)
        tensor_leaves = [index for index, leaf in enumerate(example.inputs) if isinstance(leaf, Tensor)]
        rows = rows_symbol(example, graph.sizes, tensor_leaves) if lengths else None
        leaves = [
            (GraphInput("output", i), leaf, output_openings(shape, rows) if rows else _rows_lead(shape))
            for i, (leaf, shape) in enumerate(zip(outputs, graph.sizes.outputs, strict=True))
            if isinstance(leaf, Tensor) and shape is not None
        ]
        leaves += [
            (GraphInput("target", i), leaf, example.openings(leaf, lengths=lengths))
            for i, leaf in enumerate(targets)
            if isinstance(leaf, Tensor)
        ]
        places = [(outputs if binding.kind == "output" else targets, int(binding.key)) for binding, _, _ in leaves]

        def flat_loss(*tensors: Tensor) -> Sequence[Any]:
            for (values, index), tensor in zip(places, tensors, strict=True):
                values[index] = tensor
            return (as_scalar(loss.function(tree.unflatten(outputs), unflatten(example.target_structure, targets))),)

        kept = list(outputs), list(targets)
        try:
            return trace_graph(
                flat_loss,
                loss.module,
                leaves,
                state={},
                constants=constants,
                operators=operators,
                subject="the loss",
                trained=self._trained(graph),
                restore=self.snapshot.restore,
                precision=self.precision,
            )
        except GradwireError:
            raise
        except Exception as error:
            if example.rows is not None:
                # Perhaps with fixed sizes.
                raise
            raise explain(error, "the loss") from error
        finally:
            outputs[:], targets[:] = kept
            self.snapshot.restore()

    def _trained(self, graph: TracedGraph) -> Mapping[str, Tensor]:
        """The tensors that change in training: to close over one would fix its value."""
        return {**self.state.trainable, **{name: self.state.by_name[name] for name in graph.written}}


def _loss_leaf(tree: OutputTree, outputs: list[Any]) -> int | None:
    """The output that is the loss: the only one, or `.loss`, or ["loss"]."""
    output = tree.unflatten(list(outputs))
    found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if not isinstance(found, Tensor) or found.dim() > 0 or not found.is_floating_point():
        return None
    return next((index for index, leaf in enumerate(outputs) if leaf is found), None)


def _rows_lead(shape: Sequence[Any]) -> Openings:
    """Whether the batch's rows are dimension 0 of an output, where no other size may vary."""
    return {0: ROWS_OPEN} if shape and not isinstance(shape[0], int) else {}
