"""A torch.autograd.Function, traced once with its backward, and taken apart into the two graphs that a message carries.

Autograd itself runs both on the export's tensors without values: what the function sees, and what becomes of the
gradients that it returns, is what eager gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from gradwire.exporting.function_rules import (
    context_watched,
    needs_values,
    refuse_results,
    refused,
)
from gradwire_proto.autocast import autocast
from gradwire_proto.errors import GradwireError

aten = torch.ops.aten

KINDS = (Tensor, torch.SymInt, torch.SymFloat)
"""The arguments of a function that are inputs of its graphs; the others are baked in."""


@dataclass(frozen=True, kw_only=True)
class FunctionTrace:
    """forward and backward: as in `values.CustomFunction`; forward takes `constants` behind the function's inputs.

    kinds: what each of these inputs is. results: what it gives, without values. single: whether it gives that one
    alone, and not in a tuple.
    """

    function: type
    forward: fx.GraphModule
    backward: fx.GraphModule
    kinds: Sequence[type]
    constants: Sequence[Tensor]
    results: Sequence[Tensor]
    single: bool
    differentiable_results: Sequence[int]
    differentiable_inputs: Sequence[int]


class FunctionFailed(RuntimeError):
    """A function of the user's that could not be traced, for a reason that fixed sizes may take away."""


def trace_function(function: type, apply: Callable[..., Any], arguments: Sequence[Any]) -> FunctionTrace:
    """Trace `apply(*arguments)`, which calls `function`, and its backward. Some tensor needs a gradient.

    Raises ExportError EXPORT_CUSTOM_FUNCTION or EXPORT_DATA_DEPENDENT, and FunctionFailed.
    """
    joint = _Joint(function, apply, arguments)
    mode = detect_fake_mode(arguments)
    assert mode is not None, "torch.export runs on tensors without values"
    try:
        # The export goes on around: what happens here is no part of its graph.
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing(), mode, context_watched(function):
            inputs = [_stand_in(value) for value in arguments if isinstance(value, KINDS)]
            module = make_fx(joint, tracing_mode="real", _allow_non_fake_inputs=True)(inputs)
    except GradwireError:
        raise
    except Exception as error:
        if needs_values(error):
            raise refused(function, _READS_VALUES, reason="EXPORT_DATA_DEPENDENT") from error
        raise FunctionFailed(
            f"{function.__module__}.{function.__qualname__}, a torch.autograd.Function: {type(error).__name__}: {error}"
        ) from error
    return _Split(joint, module).trace()


_READS_VALUES = (
    "needs a tensor's value in Python (an `if`, float(), .item() ...), which a graph cannot have: use torch.where, or"
    " compute with the tensor itself"
)


def _stand_in(value: Any) -> Any:
    """A leaf of autograd of its own for a tensor: the same to look at, and without a history."""
    if not isinstance(value, Tensor):
        return value
    leaf = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return leaf.requires_grad_(value.requires_grad)


@dataclass
class _Joint:
    """Forward and backward as one function, with notes of where in the graph each part is."""

    function: type
    apply: Callable[..., Any]
    arguments: Sequence[Any]
    results: tuple[Tensor, ...] = ()
    single: bool = True
    forward_nodes: frozenset[str] = frozenset()
    gradient_nodes: list[str] = field(default_factory=list)
    differentiable_results: list[int] = field(default_factory=list)
    differentiable_inputs: list[int] = field(default_factory=list)

    @property
    def kinds(self) -> list[type]:
        return [next(k for k in KINDS if isinstance(each, k)) for each in self.arguments if isinstance(each, KINDS)]

    def __call__(self, inputs: Sequence[Any]) -> list[Any]:
        given = iter(inputs)
        output = self.apply(*(next(given) if isinstance(value, KINDS) else value for value in self.arguments))
        refuse_results(self.function, output)
        self.single = isinstance(output, Tensor)
        self.results = (output,) if self.single else tuple(output)
        if any(free_unbacked_symbols(result) for result in self.results):
            raise refused(self.function, "gives a result whose size depends on values: give it a fixed size")
        mode = get_proxy_mode()
        assert mode is not None
        graph: fx.Graph = mode.tracer.graph  # type: ignore[attr-defined]
        self.forward_nodes = frozenset(node.name for node in graph.nodes)
        self.differentiable_results = [index for index, each in enumerate(self.results) if each.requires_grad]
        self.differentiable_inputs = [
            index for index, each in enumerate(inputs) if isinstance(each, Tensor) and each.requires_grad
        ]
        heads = [self.results[index] for index in self.differentiable_results]
        if not heads:
            # Nothing of it has a gradient, whatever the inputs need.
            return [*self.results, *(None for _ in self.differentiable_inputs)]
        gradients = []
        for head in heads:
            gradients.append(torch.empty(head.shape, dtype=head.dtype, device=head.device))
            self.gradient_nodes.append(list(graph.nodes)[-1].name)
        leaves = [inputs[index] for index in self.differentiable_inputs]
        with autocast("fp32"):
            found = torch.autograd.grad(heads, leaves, gradients, allow_unused=True)
        return [*self.results, *found]


class _Split:
    """The joint graph taken apart: what the backward reads of the forward becomes outputs of the one and inputs of the
    other."""

    def __init__(self, joint: _Joint, module: fx.GraphModule) -> None:
        self._joint = joint
        self._module = module
        graph = module.graph
        graph.eliminate_dead_code()
        self._refuse_values(graph)
        self._constants = self._made_in_function(graph)
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        calls = [node for node in graph.nodes if node.op == "call_function"]
        self._forward = {node for node in calls if node.name in joint.forward_nodes}
        self._gradients = {node.name: node for node in graph.nodes if node.name in joint.gradient_nodes}
        for node in calls:
            if self._is_size_of_forward(node):
                self._forward.add(node)

    def trace(self) -> FunctionTrace:
        joint, nodes = self._joint, list(self._module.graph.nodes)
        outputs = list(pytree.tree_leaves(nodes[-1].args[0]))
        results, gradients = outputs[: len(joint.results)], outputs[len(joint.results) :]
        if not all(isinstance(result, fx.Node) for result in results):
            raise refused(joint.function, "returns a tensor that is neither made of its arguments nor one of them")
        backward = [
            node
            for node in nodes
            if node.op == "call_function" and node not in self._forward and node.name not in self._gradients
        ]
        known = {*self._forward, *self._inputs, *self._constants}
        readers = [*(each for node in backward for each in node.all_input_nodes), *gradients]
        read = [node for node in dict.fromkeys(readers) if node in known]
        placeholders = [*self._inputs, *self._constants]
        forward = self._graph(placeholders, [node for node in nodes if node in self._forward], [*results, *read])
        heads = [self._gradients.get(name, name) for name in joint.gradient_nodes]
        return FunctionTrace(
            function=joint.function,
            forward=forward,
            backward=self._graph([*heads, *read], backward, gradients),
            kinds=[*joint.kinds, *(Tensor for _ in self._constants)],
            constants=list(self._constants.values()),
            results=joint.results,
            single=joint.single,
            differentiable_results=joint.differentiable_results,
            differentiable_inputs=joint.differentiable_inputs,
        )

    def _graph(self, inputs: Sequence[Any], nodes: Sequence[fx.Node], outputs: Sequence[Any]) -> fx.GraphModule:
        graph, made = fx.Graph(), {}
        for index, source in enumerate(inputs):
            made[source] = graph.placeholder(f"input_{index}")
            made[source].meta = dict(getattr(source, "meta", {}))
        for node in nodes:
            made[node] = graph.node_copy(node, made.__getitem__)
        graph.output(tuple(made[each] if isinstance(each, fx.Node) else each for each in outputs))
        graph.eliminate_dead_code()
        return fx.GraphModule({}, graph)

    def _is_size_of_forward(self, node: fx.Node) -> bool:
        """Whether a node of the backward is a size that the forward knows: the number is kept, and not the tensor."""
        inputs = node.all_input_nodes
        known = all(each in self._forward or each.op == "placeholder" for each in inputs)
        return bool(inputs) and known and isinstance(node.meta.get("val"), (torch.SymInt, int))

    def _made_in_function(self, graph: fx.Graph) -> dict[fx.Node, Tensor]:
        """The tensors that the function makes of numbers (torch.tensor). One that it did not make is refused."""
        found: dict[fx.Node, Tensor] = {}
        for node in [node for node in graph.nodes if node.op == "get_attr"]:
            value = getattr(self._module, str(node.target))
            made_here = all(
                user.target in (aten.lift_fresh_copy.default, aten.lift_fresh.default) for user in node.users
            )
            if not made_here or isinstance(value, FakeTensor) or not isinstance(value, Tensor):
                raise refused(
                    self._joint.function,
                    "uses a tensor that is not among its arguments, and would get no gradient and no new value: pass it"
                    " as an argument",
                )
            found[node] = value
        return found

    def _refuse_values(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if node.target is aten._local_scalar_dense.default:
                raise refused(self._joint.function, _READS_VALUES, reason="EXPORT_DATA_DEPENDENT")
