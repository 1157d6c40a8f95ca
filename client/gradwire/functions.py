"""A plain function of tensors -> a program without state, and gradients in the shapes that torch.func gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gradwire.export import EXPORT_LOCK
from gradwire.exporting import safety_net
from gradwire.exporting.output_tree import OutputTree
from gradwire.exporting.random_state import cuda_devices, random_state_kept
from gradwire.exporting.traced_graph import Constants, TracedGraph, trace_graph
from gradwire.exporting.tracing import explain
from gradwire.function_arguments import ArgumentTree, argument_tree, normal_leaf
from gradwire.user_values import leaf_spec
from gradwire_proto.errors import ExportError, GradwireError
from gradwire_proto.function_digest import function_digest
from gradwire_proto.tensors import from_torch
from gradwire_proto.values import Batch, FunctionSpec, GraphInput, LeafRef, Program, Structure, TensorSpec, Variant


@dataclass(frozen=True, kw_only=True)
class ExportedFunction:
    """A function as the service runs it.

    spec: its digest and program; `tensors` is empty: `constants` holds the tensors that it closes over. batch: its
    tensors, in order. value: how it nests what is differentiated; aux: how it nests the rest. Sizes are fixed.
    """

    spec: FunctionSpec
    constants: Mapping[str, Tensor]
    batch: Batch
    arguments: ArgumentTree
    value: OutputTree
    aux: OutputTree | None
    is_random: bool

    def finish(self, input_gradients: Any, outputs: Any, with_value: bool) -> Any:
        """What torch.func gives: gradients, (gradients, aux), (value, gradients) or ((value, aux), gradients).

        input_gradients: one for each tensor of the batch, None where there is none. outputs: the value, then aux's
        leaves; not looked at where neither is wanted.
        """
        places = [index for indices in self.arguments.differentiated for index in indices]
        whole = self.arguments.nest([self._gradient(input_gradients[index], index) for index in places])
        aux = None if self.aux is None else self.aux.unflatten(list(outputs[1:]))
        if not with_value:
            return whole if self.aux is None else (whole, aux)
        return (outputs[0], whole) if self.aux is None else ((outputs[0], aux), whole)

    def _gradient(self, gradient: Tensor | None, index: int) -> Tensor:
        if gradient is not None:
            return gradient
        # The function does not use it; torch.func says zero.
        dtype, shape = self.arguments.looks[index]
        return torch.zeros(shape, dtype=dtype)


def export_function(
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    scalar: bool = True,
) -> ExportedFunction:
    """Export `fn(*args)`, to be differentiated with respect to the arguments `argnums`.

    Arguments are any nesting of tensors, arrays and constants; constants are baked in, and so is what the function
    closes over. `fn` gives a scalar, or without `scalar` tensors in any nesting; with has_aux a pair of that and aux.
    Raises InvalidArgument (ARGNUMS_INVALID) and ExportError, as `ModuleExporter.export_model` does.
    """
    flat, spec = pytree.tree_flatten(tuple(args))
    leaves = [normal_leaf(leaf, index) for index, leaf in enumerate(flat)]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    arguments = argument_tree(args, argnums)
    with EXPORT_LOCK:
        return _Export(fn, leaves, spec, tensors, arguments, has_aux, scalar).finish()


class _Export:
    """One export of a function."""

    def __init__(
        self,
        fn: Callable[..., Any],
        leaves: list[Any],
        spec: pytree.TreeSpec,
        tensors: list[Tensor],
        arguments: ArgumentTree,
        has_aux: bool,
        scalar: bool,
    ) -> None:
        self._fn = fn
        self._leaves = leaves
        self._spec = spec
        self._tensors = tensors
        self._arguments = arguments
        self._has_aux = has_aux
        self._scalar = scalar
        self._watched = {index for indices in arguments.differentiated for index in indices}
        self._value: OutputTree | None = None
        self._aux: OutputTree | None = None

    def finish(self) -> ExportedFunction:
        with random_state_kept(cuda_devices(self._tensors)):
            operators: dict[str, str] = {}
            constants = Constants(prefix="constant.", known={})
            graph = self._trace(operators, constants)
            eager = safety_net.run(self._eager, self._tensors, {}, subject="the function")
            raw = safety_net.run(lambda t: self._with_loss(graph(t)), self._tensors, {}, subject="the exported graph")
            safety_net.compare(eager, raw)
        return self._assemble(graph, operators, constants)

    def _trace(self, operators: dict[str, str], constants: Constants) -> TracedGraph:
        leaves = [(GraphInput("input", index), tensor, {}) for index, tensor in enumerate(self._tensors)]
        try:
            return trace_graph(
                self._flat,
                None,
                leaves,
                state={},
                constants=constants,
                operators=operators,
                subject="the function",
            )
        except GradwireError:
            raise
        except Exception as error:
            # The function's own failure says more than the export's.
            safety_net.run(self._eager, self._tensors, {}, subject="the function")
            raise explain(error, f"the function {getattr(self._fn, '__qualname__', self._fn)!r}") from error

    def _flat(self, *tensors: Tensor) -> Sequence[Any]:
        # What is not differentiated is detached: its gradient would be computed for nobody.
        given = iter(t if index in self._watched else t.detach() for index, t in enumerate(tensors))
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        result = self._fn(*pytree.tree_unflatten(leaves, self._spec))
        if self._has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ExportError("with has_aux the function must return (value, aux)", reason="AUX_MISSING")
        value, aux = result if self._has_aux else (result, None)
        if self._scalar:
            _check_scalar(value)
        self._value, values = OutputTree.of(value)
        if not self._scalar:
            _check_differentiable(values)
        if not self._has_aux:
            return values
        self._aux, flat = OutputTree.of(aux)
        return (*values, *flat)

    def _eager(self, tensors: Sequence[Any]) -> tuple[list[Any], Tensor | None]:
        return self._with_loss(list(self._flat(*tensors)))

    def _with_loss(self, outputs: list[Any]) -> tuple[list[Any], Tensor | None]:
        return outputs, outputs[0] if self._scalar else None

    def _assemble(self, graph: TracedGraph, operators: dict[str, str], constants: Constants) -> ExportedFunction:
        assert self._value is not None, "set by every run of the function"
        places = range(len(self._tensors))
        tensors: Any = tuple(self._tensors)
        nesting: Structure = tuple(LeafRef(index) for index in places)
        specs = [leaf_spec(tensor, {}) for tensor in self._tensors]
        program = Program(
            torch_version=torch.__version__,
            tensors=constants.specs(),
            variants=(
                Variant(
                    name="eval",
                    training=False,
                    graph=graph.graph,
                    graph_inputs=graph.bindings,
                    input_structure=nesting,
                    input_leaves=tuple(spec for spec in specs if isinstance(spec, TensorSpec)),
                    output_structure=tuple(LeafRef(index) for index in range(len(graph.graph.outputs))),
                ),
            ),
            operators=operators,
        )
        return ExportedFunction(
            spec=FunctionSpec(digest=_digest(program, constants.added), program=program, tensors={}),
            constants=dict(constants.added),
            batch=Batch(tensors),
            arguments=self._arguments,
            value=self._value,
            aux=self._aux,
            is_random=_is_random(graph.module),
        )


def _check_scalar(value: Any) -> None:
    if not isinstance(value, Tensor) or value.dim() > 0 or not value.is_floating_point():
        found = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__qualname__
        raise ExportError(f"the function must return a scalar tensor, got {found}", reason="VALUE_NOT_SCALAR")


def _check_differentiable(values: Sequence[Any]) -> None:
    if not values:
        raise ExportError("the function must return tensors, got none", reason="VALUE_NOT_DIFFERENTIABLE")
    for value in values:
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            found = value.dtype if isinstance(value, Tensor) else type(value).__qualname__
            raise ExportError(
                f"the function must return floating-point or complex tensors, got {found}; with has_aux, return others"
                " beside them",
                reason="VALUE_NOT_DIFFERENTIABLE",
            )


def _digest(program: Program, constants: Mapping[str, Tensor]) -> str:
    return function_digest(program, {name: from_torch(tensor) for name, tensor in constants.items()})


def _is_random(module: fx.GraphModule) -> bool:
    """Whether an operator may draw random numbers."""
    graphs = [each for each in module.modules() if isinstance(each, fx.GraphModule)]
    return any(
        torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        for each in graphs
        for node in each.graph.nodes
    )
