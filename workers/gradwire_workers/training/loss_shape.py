"""How a loss is made of rows, read off its graph: what is summed over rows, and that only linear steps follow.

Trying cannot show that: what is clamped, chosen or flooded after rows were put together may be at rest on every batch
that is tried. What is summed must still be shown to be row by row, and trying tells by what the sums are weighed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradwire_proto.graph_writes import parse_schema, written_inputs
from gradwire_proto.operators import COND, RUN_GRAPHS, has_schema, resolve
from gradwire_proto.values import Argument, DTypeRef, Graph, GraphInput, Leaf, Node, NodeRef, TensorSpec
from gradwire_workers.sharding import has_rows

_ADDED = frozenset({"add", "sub", "rsub", "add_", "sub_"})
_SCALED = frozenset({"mul", "mul_", "multiply"})
_DIVIDED = frozenset({"div", "div_", "true_divide", "divide"})
_RESHAPED = frozenset(
    {"view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "contiguous", "clone", "alias", "to"}
    | {"_to_copy"}
)
_LINEAR = _RESHAPED | {"neg", "neg_", "detach", "select", "positive"}
_MOVED = _RESHAPED | {"unflatten", "transpose", "t", "permute", "movedim", "swapaxes", "swapdims"}
_SUMS = frozenset({"aten.mean.default", "aten.sum.default"})
_LOSSES = frozenset(
    {"cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "mse_loss", "l1_loss", "smooth_l1_loss"}
    | {"huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss"}
    | {"soft_margin_loss", "hinge_embedding_loss", "multi_margin_loss", "multilabel_margin_loss"}
    | {"cosine_embedding_loss", "margin_ranking_loss", "triplet_margin_loss"}
)
_CLAMPS = frozenset({"clamp", "clamp_min", "clip"})
_TRUTHS = frozenset(
    {"eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "isnan", "isfinite"}
)
_SIZES, _LAST = frozenset({"aten.sym_size.int", "operator.mul", "aten.sym_numel.default"}), 2**62
_WHOLE_TYPES = ("int", "uint", "bool")


@dataclass(frozen=True, kw_only=True)
class LossShape:
    """reason: why a loss is not known to be made of rows, in words; None where it is.

    rows: the values that are summed, each of which must be row by row. common: the values that all ranks have alike
    and that change how the sums count; what they are now says nothing about later. steps: the nodes behind the sums.
    """

    reason: str | None = None
    rows: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    steps: frozenset[str] = frozenset()


def loss_shape(
    graph: Graph,
    bound: Sequence[GraphInput],
    leaves: Mapping[str, Sequence[Leaf]],
    operators: Mapping[str, str],
    loss: Argument,
) -> LossShape:
    """How `loss`, a value of the graph, is made of rows. bound: what the graph's inputs are.

    leaves: by kind of input, what they are; all that are of a kind which is not there have rows.
    """
    walk = _Walk(graph, bound, leaves, operators)
    try:
        walk.linear(loss)
        walk.check_unchanged()
        walk.check_choices(loss)
    except _NotLinear as error:
        return LossShape(reason=f"the loss is computed with {error} after rows were put together")
    return LossShape(rows=tuple(walk.rows), common=tuple(walk.common), steps=frozenset(walk.steps))


class _NotLinear(Exception):
    """What stands in the way: an operator."""


class _Walk:
    """From the loss back to what is summed over rows."""

    def __init__(
        self,
        graph: Graph,
        bound: Sequence[GraphInput],
        leaves: Mapping[str, Sequence[Leaf]],
        operators: Mapping[str, str],
    ) -> None:
        self.rows: dict[str, None] = {}
        self.common: dict[str, None] = {}
        self.steps: set[str] = set()
        self._passed: set[str] = set()
        self._graph, self._operators = graph, operators
        self._nodes = {node.name: node for node in graph.nodes}
        self._specs = {
            name: leaves[each.kind][int(each.key)]
            for name, each in zip(graph.inputs, bound, strict=True)
            if each.kind in leaves
        }
        written = written_inputs(graph, operators)
        self._of_rows = {
            name
            for index, (name, each) in enumerate(zip(graph.inputs, bound, strict=True))
            if (index in written if each.kind == "tensor" else name not in self._specs or has_rows(self._specs[name]))
        }
        self._spread()

    def linear(self, value: Argument) -> None:
        """Check that a value is a linear function of sums over rows."""
        if not isinstance(value, NodeRef):
            return
        if value.name not in self._of_rows:
            self._share(value.name)
            return
        node = self._nodes.get(value.name)
        if node is None:
            raise _NotLinear("what an input holds")
        self.steps.add(node.name)
        name, arguments = _name(node), node.arguments
        if self._is_sum(node):
            for each in (*arguments, *node.keyword_arguments.values()):
                self._summed(each)
        elif name in _ADDED and _is_number(node.keyword_arguments.get("alpha", 1)) and len(arguments) == 2:
            self.linear(arguments[0])
            self.linear(arguments[1])
        elif name in _LINEAR and not _rounds_away(node):
            self.linear(arguments[0])
        elif name in _SCALED and len(arguments) == 2:
            first, second = arguments if self._is_factor(arguments[1]) else arguments[::-1]
            self._factor(second, name)
            self.linear(first)
        elif name in _DIVIDED and len(arguments) == 2 and not node.keyword_arguments:
            self.linear(arguments[0])
            if self._is_factor(arguments[1]):
                self._factor(arguments[1], name)
            else:
                self._divisor(arguments[1])
        elif name == "getitem" and isinstance(source := arguments[0], NodeRef) and source.name in self._nodes:
            raise _NotLinear(_name(self._nodes[source.name]))
        else:
            raise _NotLinear(name)

    def check_unchanged(self) -> None:
        """Nothing that was walked over may be changed in place behind the walk's back."""
        uses = [ref.name for node in self._graph.nodes for ref in _references(_all_arguments(node))]
        places = {node.name: place for place, node in enumerate(self._graph.nodes)}
        memory = {name: self._sources(name) for name in (*self.steps, *self._passed, *self.rows, *self.common)}
        for place, node in enumerate(self._graph.nodes):
            for ref in _references(self._written(node)):
                if node.name in self.steps and uses.count(ref.name) == 1:
                    continue
                changed = self._sources(ref.name)
                if any(changed & shared and places.get(name, -1) < place for name, shared in memory.items()):
                    raise _NotLinear(_name(node))

    def check_choices(self, loss: Argument) -> None:
        """No graph that the loss goes through may be chosen by what rows hold."""
        waiting, seen = [ref.name for ref in _references([loss])], set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self._nodes:
                continue
            seen.add(name)
            node = self._nodes[name]
            if name in self._of_rows and node.operator in RUN_GRAPHS and self._chooses(node):
                raise _NotLinear("cond")
            waiting += [ref.name for ref in _references(_all_arguments(node))]

    def _chooses(self, node: Node) -> bool:
        if node.operator == COND:
            return any(ref.name in self._of_rows for ref in _references(node.arguments[:1]))
        return any(map(_has_choice, self._graph.subgraphs.values()))

    def _summed(self, value: Argument) -> None:
        if not isinstance(value, NodeRef) or value.name not in self._of_rows:
            return
        name = value.name
        while (node := self._nodes.get(name)) is not None and _only_moves(node):
            source = node.arguments[0]
            assert isinstance(source, NodeRef)
            self._passed.add(name)
            name = source.name
        self.rows[name] = None

    def _divisor(self, value: Argument) -> None:
        """Check a sum over rows that a sum is divided by: what a weighted mean has below the line."""
        node = self._nodes.get(value.name) if isinstance(value, NodeRef) else None
        if node is None:
            raise _NotLinear("div")
        self.steps.add(node.name)
        name, arguments = _name(node), node.arguments
        if node.operator in _SUMS:
            self._summed(arguments[0])
        elif (name in _RESHAPED and not _rounds_away(node)) or (name in _CLAMPS and self._is_harmless(node)):
            self._divisor(arguments[0])
        elif name in _SCALED and len(arguments) == 2:
            first, second = arguments if self._is_factor(arguments[1]) else arguments[::-1]
            self._factor(second, name)
            self._divisor(first)
        else:
            raise _NotLinear(name)

    def _is_harmless(self, clamp: Node) -> bool:
        """Whether it only keeps a count from being zero."""
        _, least, most = (*clamp.arguments, None, None)[:3]
        least, most = (clamp.keyword_arguments.get(*each) for each in (("min", least), ("max", most)))
        return (
            isinstance(least, (int, float)) and 0 < least <= 1 and most is None and self._is_count(clamp.arguments[0])
        )

    def _is_count(self, value: Argument) -> bool:
        node = self._nodes.get(value.name) if isinstance(value, NodeRef) else None
        if node is None:
            return False
        if node.operator == "aten.sum.default":
            return self._is_whole(node.arguments[0])
        return _name(node) in _RESHAPED and self._is_count(node.arguments[0])

    def _is_whole(self, value: Argument) -> bool:
        if isinstance(value, (bool, int)):
            return True
        if not isinstance(value, NodeRef):
            return False
        if (spec := self._specs.get(value.name)) is not None:
            return isinstance(spec, TensorSpec) and spec.dtype.startswith(_WHOLE_TYPES)
        node = self._nodes.get(value.name)
        if node is None:
            return False
        name = _name(node)
        if name in _TRUTHS or _rounds_away(node):
            return True
        if name in _SCALED:
            return all(map(self._is_whole, node.arguments))
        return (name in _MOVED or name in ("slice", "select")) and self._is_whole(node.arguments[0])

    def _is_factor(self, value: Argument) -> bool:
        """Whether all ranks know it alike: a number, a size, or what no row has a part in."""
        if not isinstance(value, NodeRef):
            return _is_number(value)
        if value.name not in self._of_rows:
            return True
        node = self._nodes.get(value.name)
        if node is None or node.operator not in _SIZES:
            return False
        return _name(node).startswith("sym_") or all(map(self._is_factor, node.arguments))

    def _factor(self, value: Argument, operator: str) -> None:
        if not self._is_factor(value):
            raise _NotLinear(operator)
        if isinstance(value, NodeRef) and value.name not in self._of_rows:
            self._share(value.name)

    def _share(self, name: str) -> None:
        node = self._nodes.get(name)
        if node is None or (node.operator.startswith("aten.") and not _name(node).startswith("sym_")):
            self.common[name] = None

    def _is_sum(self, node: Node) -> bool:
        if node.operator in _SUMS:
            return True
        if _name(node) not in _LOSSES:
            return False
        parameters = [each.name for each in parse_schema(self._operators.get(node.operator, ""))]
        if "reduction" not in parameters:
            return False
        index = parameters.index("reduction")
        given = node.arguments[index] if len(node.arguments) > index else node.keyword_arguments.get("reduction", 1)
        return given in (1, 2)

    def _spread(self) -> None:
        """Find what rows have a part in, what was drawn, which each rank does for itself, and what either changes."""
        before = -1
        while len(self._of_rows) != before:
            before = len(self._of_rows)
            for node in self._graph.nodes:
                if _is_drawn(node) or any(ref.name in self._of_rows for ref in _references(_all_arguments(node))):
                    self._of_rows.add(node.name)
                    for ref in _references(self._written(node)):
                        self._of_rows |= self._sources(ref.name)

    def _sources(self, name: str) -> set[str]:
        """The value, and those whose memory it may share."""
        found = {name}
        while (node := self._nodes.get(name)) is not None and node.arguments:
            source = next(_references(node.arguments[:1]), None)
            shares = _name(node) in _MOVED | _LINEAR | {"slice", "getitem", "expand", "dropout"}
            if source is None or not (shares or _name(node).endswith("_")):
                break
            name = source.name
            found.add(name)
        return found

    def _written(self, node: Node) -> list[Argument]:
        parameters = parse_schema(self._operators.get(node.operator, ""))
        return [
            node.arguments[index] if index < len(node.arguments) else node.keyword_arguments.get(each.name)
            for index, each in enumerate(parameters)
            if each.written
        ]


def _name(node: Node) -> str:
    """The operator without its namespace and overload."""
    parts = node.operator.split(".")
    return parts[1] if len(parts) > 1 else node.operator


def _all_arguments(node: Node) -> list[Argument]:
    return [*node.arguments, *node.keyword_arguments.values()]


def _references(arguments: Any) -> Iterator[NodeRef]:
    for each in arguments:
        if isinstance(each, NodeRef):
            yield each
        elif isinstance(each, list):
            yield from _references(each)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _rounds_away(node: Node) -> bool:
    """Whether it makes whole numbers of what it is given."""
    return _name(node) in ("to", "_to_copy") and any(
        isinstance(each, DTypeRef) and each.name.startswith(_WHOLE_TYPES) for each in _all_arguments(node)
    )


def _only_moves(node: Node) -> bool:
    """Whether a sum over all of its numbers, but for those of some columns, is one over those of its argument."""
    if _name(node) in _MOVED:
        return isinstance(node.arguments[0], NodeRef)
    if node.operator != "aten.slice.Tensor" or len(node.arguments) < 2:
        return False
    dimension, bounds = node.arguments[1], node.arguments[2:]
    everything = len(bounds) == 2 and bounds[0] == 0 and isinstance(bounds[1], int) and bounds[1] >= _LAST
    return everything or (isinstance(dimension, int) and dimension > 0)


def _is_drawn(node: Node) -> bool:
    if not has_schema(node.operator):
        return node.operator in RUN_GRAPHS
    return torch.Tag.nondeterministic_seeded in getattr(resolve(node.operator), "tags", ())


def _has_choice(graph: Graph) -> bool:
    return any(node.operator == COND for node in graph.nodes) or any(map(_has_choice, graph.subgraphs.values()))
