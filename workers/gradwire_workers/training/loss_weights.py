"""What a rank's rows weigh in the loss of a whole batch, and the weights that are tried for a loss that is not known.

A mean over something is the mean of its parts' means, weighed by how much of it each part has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradwire_proto.errors import FailedPrecondition
from gradwire_proto.values import Graph, Leaf, NodeRef, TensorSpec, Variant, leaves
from gradwire_workers.programs import BuiltProgram
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows

_IGNORED = (-100, 0)
"""What targets that do not count hold in torch and transformers, and masks where they hide something."""
_MOST_NUMBERS, _MOST_ORDERS, _MOST_WEIGHTS, _SMALL_CONSTANT = 12, 3, 128, 4
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "cross_entropy_loss", "nll_loss", "nll_loss_nd"})
_ORDERS = ("ge", "gt", "lt", "le")
_COUNTED = {"ne": "not", "ge": "at least", "gt": "more than", "lt": "less than", "le": "at most"}
_GIVEN = "given"
_INTEGERS = frozenset({"int64", "int32", "int16", "int8", "uint8"})


@dataclass(frozen=True, kw_only=True)
class LossWeight:
    """How ranks' losses become the batch's. words: what the loss is, for a sentence that begins with "the loss is".

    of: what the rows of a shard weigh in a mean; None where losses are added up. reads: the inputs of rounded
    numbers that it looks at: no shard knows how the loss changes with what the others' rows weigh. key: by which
    `weight_named` finds it again, whatever the model's tensors hold by then.
    """

    key: str
    words: str
    of: Callable[[Shard], Tensor | float] | None
    reads: frozenset[int] = frozenset()


MEAN = LossWeight(key="mean", words="a mean over rows", of=lambda shard: float(shard.count))
SUM = LossWeight(key="sum", words="a sum over rows", of=None)


def given_weight(program: BuiltProgram, variant: Variant, reduction: str | None) -> LossWeight | None:
    """The weight that the client gave for a variant's loss; None where it gave none."""
    if variant.weight_graph is not None:
        return LossWeight(
            key=_GIVEN,
            words="a mean by the weights that loss_weight gives",
            of=lambda shard: program.weight(variant.name, shard.inputs, shard.targets),
            reads=frozenset(
                int(each.key)
                for each in variant.weight_graph_inputs
                if each.kind == "input" and _is_rounded(variant.input_leaves[int(each.key)])
            ),
        )
    return None if reduction is None else {"mean": MEAN, "sum": SUM}[reduction]


def weight_named(key: str, program: BuiltProgram, variant: Variant) -> LossWeight:
    """The weight that had this key when it was found. FailedPrecondition (STATE_UNFIT) for none that there can be."""
    simple = {MEAN.key: MEAN, SUM.key: SUM, _GIVEN: given_weight(program, variant, None)}.get(key)
    if simple is not None:
        return simple
    try:
        comparison, number, index, shift, classes = key.split(":", 4)
        weights = program.tensors_by_name()[classes] if classes else None
        if comparison in _COUNTED and isinstance(variant.input_leaves[int(index)], TensorSpec):
            return _mean_over(variant, comparison, int(number), int(index), int(shift), classes, weights)
    except (ValueError, KeyError, IndexError):
        pass
    raise FailedPrecondition(
        f"the variant {variant.name!r} has no loss weight {key[:200]!r}: the state is another model's",
        reason="STATE_UNFIT",
    )


def weights_to_try(program: BuiltProgram, variant: Variant) -> list[LossWeight]:
    """Weights that the loss which a program returns may have, the likeliest first.

    Rows; nothing, for a sum; and what is not ignored of each input of whole numbers, as it is or without its first
    column (the target of a token is the one after it), counted or by the class weights of a cross entropy.
    """
    return [MEAN, SUM, *_of_leaves(program, variant)][:_MOST_WEIGHTS]


def numbers_compared(program: BuiltProgram, variant: Variant) -> tuple[int, ...]:
    """The whole numbers to which a variant's graph compares something, and those that are ignored by custom."""
    return tuple(dict.fromkeys((*_IGNORED, *numbers_in(program, variant))))[:_MOST_NUMBERS]


def numbers_in(program: BuiltProgram, variant: Variant) -> tuple[int, ...]:
    """The whole numbers to which a variant's graphs compare something."""
    found: dict[int, None] = {}
    for graph in (variant.graph, variant.loss_graph):
        for operator, arguments in _calls(graph) if graph is not None else ():
            if operator in _COMPARISONS:
                found |= dict.fromkeys(int(each) for each in arguments if _is_whole(each))
    for tensor in program.all_state().values():
        if tensor.numel() <= _SMALL_CONSTANT and not (tensor.is_floating_point() or tensor.is_complex()):
            found |= dict.fromkeys(int(each) for each in tensor.reshape(-1).tolist())
    return tuple(found)[:_MOST_NUMBERS]


def _of_leaves(program: BuiltProgram, variant: Variant) -> Iterator[LossWeight]:
    classes = {"": None, **_class_weights(program, variant)}
    for comparison, number in _what_counts(program, variant):
        for index, spec in enumerate(variant.input_leaves):
            if not isinstance(spec, TensorSpec) or not has_rows(spec) or spec.dtype not in (*_INTEGERS, "bool"):
                continue
            for shift in (0, 1) if len(spec.shape) > 1 else (0,):
                for name, weights in classes.items():
                    yield _mean_over(variant, comparison, number, index, shift, name, weights)


def _mean_over(
    variant: Variant, comparison: str, number: int, index: int, shift: int, classes: str, weights: Tensor | None
) -> LossWeight:
    """classes: the name of the class weights, none for ""."""
    name = [path for path, _ in leaves(variant.input_structure, "inputs")][index]
    words = f"a mean over what is {_COUNTED[comparison]} {number} in {name}"
    words += " but for its first column" if shift else ""
    words += ", by class weights" if weights is not None else ""
    return LossWeight(
        key=f"{comparison}:{number}:{index}:{shift}:{classes}",
        words=words,
        of=_counting(index, comparison, number, shift, weights),
    )


def _what_counts(program: BuiltProgram, variant: Variant) -> Iterator[tuple[str, int]]:
    """(operator that compares, number): what may be counted, the likeliest first."""
    assert variant.graph is not None
    for number in numbers_compared(program, variant):
        yield "ne", number
    ordered = {
        int(each): None
        for operator, arguments in _calls(variant.graph)
        if operator in _ORDERS
        for each in arguments
        if _is_whole(each)
    }
    for number in tuple(ordered)[:_MOST_ORDERS]:
        for comparison in _ORDERS:
            yield comparison, number


def _counting(
    index: int, comparison: str, number: int, shift: int, weights: Tensor | None
) -> Callable[[Shard], Tensor]:
    def of(shard: Shard) -> Tensor:
        leaf: Tensor = shard.inputs[index]
        leaf = leaf[:, shift:] if shift else leaf
        counted = getattr(torch, comparison)(leaf, number)
        if weights is None:
            return counted.sum()
        return weights.double()[leaf.long().clamp(0, len(weights) - 1)].where(counted, 0).sum()

    return of


def _class_weights(program: BuiltProgram, variant: Variant) -> dict[str, Tensor]:
    """The weights of classes that the variant's cross entropies have, by the tensor's name."""
    graph = variant.graph
    assert graph is not None
    tensors = {
        name: str(each.key)
        for name, each in zip(graph.inputs, variant.graph_inputs, strict=True)
        if each.kind == "tensor"
    }
    state, found = program.tensors_by_name(), {}
    for operator, arguments in _calls(graph):
        weight = (
            arguments[2] if operator in ("cross_entropy_loss", "nll_loss", "nll_loss_nd") and len(arguments) > 2 else 0
        )
        if isinstance(weight, NodeRef) and weight.name in tensors:
            tensor = state[tensors[weight.name]]
            if tensor.dim() == 1 and tensor.is_floating_point() and not tensor.requires_grad:
                found[tensors[weight.name]] = tensor
    return found


def _calls(graph: Graph) -> Iterator[tuple[str, Sequence[Any]]]:
    """(operator without its namespace and overload, positional and keyword arguments), subgraphs' too."""
    for node in graph.nodes:
        parts = node.operator.split(".")
        yield parts[1] if len(parts) > 1 else "", (*node.arguments, *node.keyword_arguments.values())
    for each in graph.subgraphs.values():
        yield from _calls(each)


def _is_rounded(leaf: Leaf) -> bool:
    return isinstance(leaf, TensorSpec) and leaf.dtype.startswith(("float", "bfloat", "complex"))


def _is_whole(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**31 and value == int(value)
    )


def own_weight(weight: LossWeight, shard: Shard) -> float:
    """What a rank's rows weigh. Where losses are added up, and in a dummy, nothing needs to be weighed."""
    return float(weight.of(shard)) if weight.of is not None and shard.count else 0.0


def share_of(weight: LossWeight, own: float, everyones: Sequence[float], count: int, rows: int) -> float:
    """By what a rank's loss is multiplied, so that all ranks' add up to the batch's.

    own, everyones: what its `count` rows weigh, and what each rank's do. rows: how many the batch has.
    """
    if weight.of is None:
        return float(count > 0)
    if not any(everyones):
        # Where nothing counts at all, torch's answer is what each of the parts says: not a number, or zero.
        return count / rows
    total = sum(everyones)
    if total == 0:
        # Weights that cancel: torch divides by zero, and so must this.
        return math.copysign(math.inf, own) if own else 0.0
    return own / total
