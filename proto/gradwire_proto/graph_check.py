"""Is a program well formed? Cheap checks of names, references, operators and sizes, before anything is built.

Raises InvalidArgument with the path of the field at fault, or ResourceExhausted naming the limit. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.node_check import GraphCheck, malformed, short
from gradwire_proto.values import (
    ITEM_SIZE,
    Graph,
    GraphInput,
    LeafRef,
    Limits,
    Program,
    StateTensor,
    Structure,
    TensorSpec,
    Variant,
)

_ROLES = frozenset({"parameter", "buffer", "temporary_buffer", "constant"})
_DIFFERENTIABLE = frozenset({"float64", "float32", "float16", "bfloat16", "complex64", "complex128"})
_MAX_ELEMENTS = 2**62


def check_program(program: Program, *, limits: Limits | None = None, field: str = "program") -> None:
    """Check a whole program. Messages of errors name the limit or the bound."""
    limits = limits or Limits()
    if not program.variants:
        raise malformed(f"{field}.variants", "a program needs at least one variant")
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
            raise malformed(f"{path}.name", f"expected a name used once, got {short(tensor.name)}")
        if tensor.role not in _ROLES:
            raise malformed(f"{path}.role", f"expected one of {sorted(_ROLES)}, got {short(tensor.role)}")
        if tensor.dtype not in ITEM_SIZE:
            raise malformed(f"{path}.dtype", f"unknown element type {short(tensor.dtype)}")
        if any(size < 0 for size in tensor.shape) or prod(tensor.shape) > _MAX_ELEMENTS:
            raise malformed(f"{path}.shape", f"impossible shape {list(tensor.shape)[:16]}")
        if tensor.requires_grad and (tensor.role != "parameter" or tensor.dtype not in _DIFFERENTIABLE):
            raise malformed(f"{path}.requires_grad", "only parameters of floating point or complex type have gradients")
        by_name[tensor.name] = tensor
    total = 0
    for index, tensor in enumerate(by_name.values()):
        if tensor.alias_of is None:
            total += prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
            continue
        target = by_name.get(tensor.alias_of)
        same = ("role", "dtype", "shape", "requires_grad", "may_train")
        if target is None or target.alias_of is not None or any(getattr(target, k) != getattr(tensor, k) for k in same):
            raise malformed(
                f"{field}[{index}].alias_of", f"{short(tensor.alias_of)} is no tensor of its own with the same type"
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
        raise malformed(f"{field}.graph", "missing")
    names = {tensor.name for tensor in tensors}
    _check_symbols(variant, field)
    leaves = {"input": len(variant.input_leaves), "target": len(variant.target_leaves)}
    _check_structure(variant.input_structure, leaves["input"], f"{field}.input_structure")
    _check_structure(variant.target_structure, leaves["target"], f"{field}.target_structure")
    _check_structure(variant.output_structure, len(variant.graph.outputs), f"{field}.output_structure")
    _check_graph_inputs(variant, variant.graph, variant.graph_inputs, {"input"}, names, f"{field}.graph_inputs")
    count = GraphCheck(operators, limits).check(variant.graph, f"{field}.graph")
    for name, kinds in (("loss_graph", {"output", "target"}), ("weight_graph", {"input", "target"})):
        graph: Graph | None = getattr(variant, name)
        inputs: tuple[GraphInput, ...] = getattr(variant, f"{name}_inputs")
        if graph is None:
            if inputs:
                raise malformed(f"{field}.{name}_inputs", f"there is no {name}")
            continue
        _check_graph_inputs(variant, graph, inputs, kinds, names, f"{field}.{name}_inputs")
        if len(graph.outputs) != 1:
            raise malformed(f"{field}.{name}.outputs", f"expected 1, got {len(graph.outputs)}")
        count = GraphCheck(operators, limits, count).check(graph, f"{field}.{name}")


def _check_symbols(variant: Variant, field: str) -> None:
    _check_unique((symbol.name for symbol in variant.symbols), f"{field}.symbols", "symbol")
    for index, symbol in enumerate(variant.symbols):
        if symbol.min < 0 or (symbol.max is not None and symbol.max < symbol.min):
            raise malformed(f"{field}.symbols[{index}]", f"impossible bounds [{symbol.min}, {symbol.max}]")
    declared = {symbol.name for symbol in variant.symbols}
    for kind in ("input_leaves", "target_leaves"):
        for index, leaf in enumerate(getattr(variant, kind)):
            if not isinstance(leaf, TensorSpec):
                continue
            path = f"{field}.{kind}[{index}]"
            if leaf.dtype not in ITEM_SIZE:
                raise malformed(f"{path}.dtype", f"unknown element type {short(leaf.dtype)}")
            for size in leaf.shape:
                if isinstance(size, str) and size not in declared:
                    raise malformed(f"{path}.shape", f"symbol {short(size)} is not declared in symbols")
                if isinstance(size, int) and not 0 <= size <= _MAX_ELEMENTS:
                    raise malformed(f"{path}.shape", f"impossible size {size}")


def _check_structure(structure: Structure, count: int, field: str) -> None:
    """Each leaf from 0 to count - 1 stands exactly once."""
    found = sorted(_leaf_indices(structure))
    if found != list(range(count)):
        raise malformed(field, f"expected each leaf from 0 to {count - 1} once" if count else "expected no leaves")


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
        raise malformed(field, f"the graph has {len(graph.inputs)} inputs, but {len(inputs)} are bound")
    leaves = {"input": variant.input_leaves, "target": variant.target_leaves}
    for index, each in enumerate(inputs):
        path = f"{field}[{index}]"
        if each.kind == "tensor":
            if each.key not in tensors:
                raise malformed(path, f"there is no tensor {short(each.key)}")
        elif each.kind not in kinds or not isinstance(each.key, int):
            raise malformed(path, f"expected a tensor, or one of {sorted(kinds)}, got {each.kind}")
        elif each.kind == "output":
            if not 0 <= each.key < len(variant.graph.outputs if variant.graph else ()):
                raise malformed(path, f"there is no output {each.key}")
        elif not 0 <= each.key < len(leaves[each.kind]):
            raise malformed(path, f"there is no {each.kind} leaf {each.key}")
        elif not isinstance(leaves[each.kind][each.key], TensorSpec):
            raise malformed(path, f"{each.kind} leaf {each.key} is a constant")


def _check_unique(names: Iterable[str], field: str, kind: str) -> None:
    seen: set[str] = set()
    for name in names:
        if not name or name in seen:
            raise malformed(field, f"expected names used once, got {kind} {short(name)}")
        seen.add(name)
