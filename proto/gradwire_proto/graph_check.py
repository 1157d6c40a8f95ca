"""Is a program well formed? Cheap checks of names, references, operators and sizes, before anything is built.

Raises InvalidArgument with the path of the field at fault, or ResourceExhausted naming the limit. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.graph_writes import parse_schema
from gradwire_proto.operators import AUTOCAST_REGION, REGIONS, allowed_operators, has_schema
from gradwire_proto.values import (
    ITEM_SIZE,
    Argument,
    Graph,
    GraphInput,
    LeafRef,
    Limits,
    Node,
    NodeRef,
    Program,
    StateTensor,
    Structure,
    SubgraphRef,
    TensorSpec,
    Variant,
)

MAX_SUBGRAPH_DEPTH = 8
_ROLES = frozenset({"parameter", "buffer", "temporary_buffer", "constant"})
_DIFFERENTIABLE = frozenset({"float64", "float32", "float16", "bfloat16", "complex64", "complex128"})
_MAX_ELEMENTS = 2**62


def check_program(program: Program, *, limits: Limits | None = None, field: str = "program") -> None:
    """Check a whole program. Messages of errors name the limit or the bound."""
    limits = limits or Limits()
    if not program.variants:
        raise _malformed(f"{field}.variants", "a program needs at least one variant")
    if len(program.variants) > limits.variants:
        raise ResourceExhausted(
            f"{len(program.variants)} variants; the limit `variants` is {limits.variants}",
            field=f"{field}.variants",
            reason="TOO_MANY_VARIANTS",
        )
    _check_unique((each.name for each in program.variants), f"{field}.variants", "variant")
    check_tensors(program.tensors, limits=limits, field=f"{field}.tensors")
    for index, variant in enumerate(program.variants):
        path = f"{field}.variants[{index}]"
        check_variant(variant, program.tensors, program.operators, limits=limits, field=path)


def check_tensors(tensors: Iterable[StateTensor], *, limits: Limits | None = None, field: str = "tensors") -> None:
    """Check a program's tensors: unique names, known types, aliases of tensors that are of their own, bytes in all."""
    limits = limits or Limits()
    by_name: dict[str, StateTensor] = {}
    for index, tensor in enumerate(tensors):
        path = f"{field}[{index}]"
        if not tensor.name or tensor.name in by_name:
            raise _malformed(f"{path}.name", f"expected a name used once, got {_short(tensor.name)}")
        if tensor.role not in _ROLES:
            raise _malformed(f"{path}.role", f"expected one of {sorted(_ROLES)}, got {_short(tensor.role)}")
        if tensor.dtype not in ITEM_SIZE:
            raise _malformed(f"{path}.dtype", f"unknown element type {_short(tensor.dtype)}")
        if any(size < 0 for size in tensor.shape) or prod(tensor.shape) > _MAX_ELEMENTS:
            raise _malformed(f"{path}.shape", f"impossible shape {list(tensor.shape)[:16]}")
        if tensor.requires_grad and (tensor.role != "parameter" or tensor.dtype not in _DIFFERENTIABLE):
            raise _malformed(
                f"{path}.requires_grad", "only parameters of floating point or complex type have gradients"
            )
        by_name[tensor.name] = tensor
    total = 0
    for index, tensor in enumerate(by_name.values()):
        if tensor.alias_of is None:
            total += prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
            continue
        target = by_name.get(tensor.alias_of)
        same = ("role", "dtype", "shape", "requires_grad")
        if target is None or target.alias_of is not None or any(getattr(target, k) != getattr(tensor, k) for k in same):
            raise _malformed(
                f"{field}[{index}].alias_of", f"{_short(tensor.alias_of)} is no tensor of its own with the same type"
            )
    if total > limits.model_bytes:
        raise ResourceExhausted(
            f"the tensors have {total} bytes; the limit `model_bytes` is {limits.model_bytes}",
            field=field,
            reason="MODEL_TOO_LARGE",
        )


def check_variant(
    variant: Variant,
    tensors: Iterable[StateTensor],
    operators: Mapping[str, str],
    *,
    limits: Limits | None = None,
    field: str = "variant",
) -> None:
    """Check one variant against the program's tensors and operator schemas."""
    limits = limits or Limits()
    if variant.graph is None:
        raise _malformed(f"{field}.graph", "missing")
    names = {tensor.name for tensor in tensors}
    _check_symbols(variant, field)
    leaves = {"input": len(variant.input_leaves), "target": len(variant.target_leaves)}
    _check_structure(variant.input_structure, leaves["input"], f"{field}.input_structure")
    _check_structure(variant.target_structure, leaves["target"], f"{field}.target_structure")
    _check_structure(variant.output_structure, len(variant.graph.outputs), f"{field}.output_structure")
    _check_graph_inputs(variant, variant.graph, variant.graph_inputs, {"input"}, names, f"{field}.graph_inputs")
    count = _GraphCheck(operators, limits).check(variant.graph, f"{field}.graph")
    if variant.loss_graph is not None:
        _check_graph_inputs(
            variant,
            variant.loss_graph,
            variant.loss_graph_inputs,
            {"output", "target"},
            names,
            f"{field}.loss_graph_inputs",
        )
        if len(variant.loss_graph.outputs) != 1:
            raise _malformed(f"{field}.loss_graph.outputs", f"expected 1, got {len(variant.loss_graph.outputs)}")
        _GraphCheck(operators, limits, count).check(variant.loss_graph, f"{field}.loss_graph")
    elif variant.loss_graph_inputs:
        raise _malformed(f"{field}.loss_graph_inputs", "there is no loss graph")


def _check_symbols(variant: Variant, field: str) -> None:
    _check_unique((symbol.name for symbol in variant.symbols), f"{field}.symbols", "symbol")
    for index, symbol in enumerate(variant.symbols):
        if symbol.min < 0 or (symbol.max is not None and symbol.max < symbol.min):
            raise _malformed(f"{field}.symbols[{index}]", f"impossible bounds [{symbol.min}, {symbol.max}]")
    declared = {symbol.name for symbol in variant.symbols}
    for kind in ("input_leaves", "target_leaves"):
        for index, leaf in enumerate(getattr(variant, kind)):
            if not isinstance(leaf, TensorSpec):
                continue
            path = f"{field}.{kind}[{index}]"
            if leaf.dtype not in ITEM_SIZE:
                raise _malformed(f"{path}.dtype", f"unknown element type {_short(leaf.dtype)}")
            for size in leaf.shape:
                if isinstance(size, str) and size not in declared:
                    raise _malformed(f"{path}.shape", f"symbol {_short(size)} is not declared in symbols")
                if isinstance(size, int) and not 0 <= size <= _MAX_ELEMENTS:
                    raise _malformed(f"{path}.shape", f"impossible size {size}")


def _check_structure(structure: Structure, count: int, field: str) -> None:
    """Each leaf from 0 to count - 1 stands exactly once."""
    found = sorted(_leaf_indices(structure))
    if found != list(range(count)):
        raise _malformed(field, f"expected each leaf from 0 to {count - 1} once" if count else "expected no leaves")


def _leaf_indices(structure: Structure) -> Iterable[int]:
    if isinstance(structure, LeafRef):
        yield structure.index
    elif isinstance(structure, (tuple, list)):
        for item in structure:
            yield from _leaf_indices(item)
    elif isinstance(structure, dict):
        for item in structure.values():
            yield from _leaf_indices(item)


def _check_graph_inputs(
    variant: Variant, graph: Graph, inputs: tuple[GraphInput, ...], kinds: set[str], tensors: set[str], field: str
) -> None:
    if len(inputs) != len(graph.inputs):
        raise _malformed(field, f"the graph has {len(graph.inputs)} inputs, but {len(inputs)} are bound")
    leaves = {"input": variant.input_leaves, "target": variant.target_leaves}
    for index, each in enumerate(inputs):
        path = f"{field}[{index}]"
        if each.kind == "tensor":
            if each.key not in tensors:
                raise _malformed(path, f"there is no tensor {_short(each.key)}")
        elif each.kind not in kinds or not isinstance(each.key, int):
            raise _malformed(path, f"expected a tensor, or one of {sorted(kinds)}, got {each.kind}")
        elif each.kind == "output":
            if not 0 <= each.key < len(variant.graph.outputs if variant.graph else ()):
                raise _malformed(path, f"there is no output {each.key}")
        elif not 0 <= each.key < len(leaves[each.kind]):
            raise _malformed(path, f"there is no {each.kind} leaf {each.key}")
        elif not isinstance(leaves[each.kind][each.key], TensorSpec):
            raise _malformed(path, f"{each.kind} leaf {each.key} is a constant")


class _GraphCheck:
    """Checks graphs and counts their nodes, subgraphs included."""

    def __init__(self, operators: Mapping[str, str], limits: Limits, count: int = 0) -> None:
        self._operators = operators
        self._limits = limits
        self._count = count

    def check(self, graph: Graph, field: str, depth: int = 0) -> int:
        """Check a graph; the number of nodes seen so far."""
        if depth > MAX_SUBGRAPH_DEPTH:
            raise _malformed(field, f"subgraphs nested deeper than {MAX_SUBGRAPH_DEPTH}")
        self._count += len(graph.nodes)
        if self._count > self._limits.graph_nodes:
            raise ResourceExhausted(
                f"more than {self._limits.graph_nodes} nodes; the limit is `graph_nodes`",
                field=field,
                reason="GRAPH_TOO_LARGE",
            )
        known: set[str] = set()
        for index, name in enumerate(graph.inputs):
            if not name or name in known:
                raise _malformed(f"{field}.inputs[{index}]", f"expected a name used once, got {_short(name)}")
            known.add(name)
        for index, node in enumerate(graph.nodes):
            self._check_node(node, graph, known, f"{field}.nodes[{index}]")
            known.add(node.name)
        for index, output in enumerate(graph.outputs):
            _check_argument(output, known, f"{field}.outputs[{index}]")
        for name, subgraph in graph.subgraphs.items():
            self.check(subgraph, f"{field}.subgraphs[{_short(name)}]", depth + 1)
        return self._count

    def _check_node(self, node: Node, graph: Graph, known: set[str], field: str) -> None:
        if node.operator not in allowed_operators():
            raise InvalidArgument(
                f"operator {_short(node.operator)} is not in the allowlist",
                field=f"{field}.operator",
                reason="OPERATOR_NOT_ALLOWED",
            )
        if not node.name or node.name in known:
            raise _malformed(f"{field}.name", f"expected a name used once, got {_short(node.name)}")
        if node.operator in REGIONS:
            _check_region(node, graph, known, field)
            return
        for index, argument in enumerate(node.arguments):
            _check_argument(argument, known, f"{field}.arguments[{index}]")
        for name, argument in node.keyword_arguments.items():
            _check_argument(argument, known, f"{field}.keyword_arguments[{_short(name)}]")
        if has_schema(node.operator):
            self._check_arity(node, field)
        elif node.keyword_arguments or not 1 <= len(node.arguments) <= 3:
            raise _malformed(field, f"{node.operator} takes 1 to 3 arguments, by position")

    def _check_arity(self, node: Node, field: str) -> None:
        schema = self._operators.get(node.operator)
        if schema is None:
            raise _malformed(f"{field}.operator", f"the program brings no schema of {node.operator}")
        names = [parameter.name for parameter in parse_schema(schema)]
        if len(node.arguments) > len(names):
            raise _malformed(
                f"{field}.arguments", f"{node.operator} takes {len(names)} arguments, got {len(node.arguments)}"
            )
        for name in node.keyword_arguments:
            if name not in names[len(node.arguments) :]:
                raise _malformed(f"{field}.keyword_arguments", f"{node.operator} takes no {_short(name)} there")


def _check_region(node: Node, graph: Graph, known: set[str], field: str) -> None:
    """A region takes its settings, one subgraph, and that subgraph's inputs, all by position."""
    settings = 4 if node.operator == AUTOCAST_REGION else 1
    if node.keyword_arguments or len(node.arguments) <= settings:
        raise _malformed(field, f"{node.operator} takes {settings} settings, a subgraph and its inputs")
    subgraph = node.arguments[settings]
    if not isinstance(subgraph, SubgraphRef) or subgraph.name not in graph.subgraphs:
        raise _malformed(f"{field}.arguments[{settings}]", "expected a subgraph of this graph")
    inputs = node.arguments[settings + 1 :]
    expected = len(graph.subgraphs[subgraph.name].inputs)
    if len(inputs) != expected:
        raise _malformed(f"{field}.arguments", f"the subgraph takes {expected} inputs, got {len(inputs)}")
    for index, argument in enumerate((*node.arguments[:settings], *inputs)):
        _check_argument(argument, known, f"{field}.arguments[{index}]")


def _check_argument(argument: Argument, known: set[str], field: str) -> None:
    if isinstance(argument, NodeRef):
        if argument.name not in known:
            raise _malformed(field, f"{_short(argument.name)} is no input or earlier node")
    elif isinstance(argument, SubgraphRef):
        raise _malformed(field, "a subgraph cannot stand here")
    elif isinstance(argument, list):
        for item in argument:
            _check_argument(item, known, field)


def _check_unique(names: Iterable[str], field: str, kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise _malformed(field, f"expected names used once, got {kind} {_short(name)}")
        seen.add(name)


def _short(name: object) -> str:
    return repr(name if not isinstance(name, str) else name[:80])


def _malformed(field: str, message: str) -> InvalidArgument:
    return InvalidArgument(message, field=field, reason="GRAPH_MALFORMED")
