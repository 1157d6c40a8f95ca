"""The sizes besides rows that may vary (lengths, image sizes): found in the traces of a forward and its loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import Tensor
from torch.utils._sympy.numbers import int_oo

from gradwire.exporting.example import Example, Place
from gradwire.exporting.open_sizes import OpenSizes, Size, symbols_of
from gradwire.exporting.size_box import Bounds, equal_symbols, largest_box
from gradwire.exporting.tracing import OPEN_IF_POSSIBLE, ROWS_OPEN, Openings
from gradwire_proto.values import GraphInput, Symbol


class LengthsNotOpen(Exception):
    """The graph needs something of other sizes and rows together that no symbol says: other sizes must be fixed."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """places: the symbol at each dimension that may vary, rows aside. symbols: their bounds. sizes: the example's."""

    places: Mapping[Place, str] = field(default_factory=dict)
    symbols: tuple[Symbol, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LengthSearch:
    """What is known when the graphs are traced.

    forward: its sizes. compared: what a loss by name demands of its target's dimensions, in the forward's sizes.
    others: the sizes of further graphs, such as the loss's, and what their leaves are.
    """

    example: Example
    forward: OpenSizes
    compared: Sequence[tuple[int, Size]] = ()
    others: Sequence[tuple[OpenSizes, Sequence[GraphInput]]] = ()

    def find(self) -> Lengths:
        """The sizes that may vary. Raises LengthsNotOpen where rows may not, with other sizes open."""
        ties = _Ties()
        rows = rows_symbol(self.example, self.forward)
        if rows is None:
            raise LengthsNotOpen("no input has rows that may vary")
        for leaf, shape in zip(self.example.tensor_leaves, self.forward.leaves, strict=True):
            for dimension, size in enumerate(shape):
                if dimension == 0 and self.example.has_rows(self.example.inputs[leaf]):
                    ties.require(size == rows)
                else:
                    ties.put(("input", leaf, dimension), size, rows)
        guards, ranges = list(self.forward.guards), _intersected(_bounds(self.forward, {}))
        for dimension, size in self.compared:
            if dimension or size != rows:
                ties.put(("target", 0, dimension), size, rows)
        for sizes, leaves in self.others:
            same = self._same(sizes, leaves, ties, rows)
            guards += [guard.xreplace(same) for guard in sizes.guards]
            ranges = _intersected([*ranges.items(), *_bounds(sizes, same)])
        return self._bounded(ties, guards, ranges)

    def _same(
        self, other: OpenSizes, leaves: Sequence[GraphInput], ties: _Ties, rows: sympy.Symbol
    ) -> dict[sympy.Basic, sympy.Basic]:
        """Another graph's open sizes in terms of the forward's; those of targets alone are new."""
        same: dict[sympy.Basic, sympy.Basic] = {}
        links = sorted(self._links(other, leaves, ties, rows), key=lambda link: not isinstance(link[0], sympy.Symbol))
        for theirs, ours in links:
            if isinstance(theirs, sympy.Symbol) and isinstance(ours, (int, sympy.Symbol)):
                known = same.setdefault(theirs, sympy.sympify(ours))
                if known != ours:
                    ties.require(rows not in (known, ours))
                    ties.fixed |= symbols_of(known) | symbols_of(ours)
            elif not _follows(theirs, ours, same):
                # The other graph has fixed it, or ties it to its other sizes in a way of its own.
                ties.require(rows not in symbols_of(ours) and isinstance(theirs, int))
                ties.fixed |= symbols_of(ours)
        for symbol in {each for shape in other.leaves for size in shape for each in symbols_of(size)}:
            same.setdefault(symbol, sympy.Dummy(symbol.name, **symbol.assumptions0))
        for binding, shape in zip(leaves, other.leaves, strict=True):
            if binding.kind == "target":
                leaf = int(binding.key)
                first = int(self.example.has_rows(self.example.targets[leaf]))
                for dimension, size in list(enumerate(shape))[first:]:
                    size = size if isinstance(size, int) else size.xreplace(same)
                    ties.put(("target", leaf, dimension), size, rows)
        return same

    def _links(
        self, other: OpenSizes, leaves: Sequence[GraphInput], ties: _Ties, rows: sympy.Symbol
    ) -> Iterator[tuple[Size, Size]]:
        """(a size in another graph's trace, what it is in the forward's)."""
        for binding, shape in zip(leaves, other.leaves, strict=True):
            leaf = int(binding.key)
            if binding.kind == "output":
                yield from zip(shape, self.forward.outputs[leaf] or (), strict=True)
            elif binding.kind == "input":
                yield from zip(shape, self.forward.leaves[self.example.tensor_leaves.index(leaf)], strict=True)
            else:
                for dimension, size in enumerate(shape):
                    place = ("target", leaf, dimension)
                    if dimension == 0 and self.example.has_rows(self.example.targets[leaf]):
                        yield size, rows
                    elif place in ties.sizes:
                        yield size, ties.sizes[place]

    def _bounded(self, ties: _Ties, guards: Sequence[sympy.Basic], ranges: Mapping[sympy.Symbol, Bounds]) -> Lengths:
        sizes = {symbol: self._size(place) for place, symbol in ties.places.items()}
        equal = equal_symbols(guards, sizes)
        places = {place: equal.get(symbol, symbol) for place, symbol in ties.places.items()}
        ranges = _intersected((equal.get(symbol, symbol), bounds) for symbol, bounds in ranges.items())
        for symbol in {equal.get(symbol, symbol) for symbol in ties.fixed} & sizes.keys():
            ranges[symbol] = (sizes[symbol], sizes[symbol])
        box = largest_box([guard.xreplace(equal) for guard in guards], ranges, sizes)
        if box is None:
            raise LengthsNotOpen("what the graph needs of its sizes ties them to the rows")
        names: dict[sympy.Symbol, str] = {}
        for (_, _, dimension), symbol in places.items():
            low, high = box[symbol]
            if symbol not in names and low != high:
                names[symbol] = _new_name(dimension, names.values())
        return Lengths(
            places={place: names[symbol] for place, symbol in places.items() if symbol in names},
            symbols=tuple(Symbol(name, *box[symbol]) for symbol, name in names.items()),
            sizes={name: sizes[symbol] for symbol, name in names.items()},
        )

    def _size(self, place: Place) -> int:
        kind, leaf, dimension = place
        tensor = (self.example.inputs if kind == "input" else self.example.targets)[leaf]
        assert isinstance(tensor, Tensor)
        return tensor.shape[dimension]


def rows_symbol(example: Example, sizes: OpenSizes) -> sympy.Symbol | None:
    """The open size that is the batch's rows, in a forward's trace; None where they are not open."""
    for leaf, shape in zip(example.tensor_leaves, sizes.leaves, strict=True):
        if example.has_rows(example.inputs[leaf]) and isinstance(shape[0], sympy.Symbol):
            return shape[0]
    return None


def output_openings(shape: Sequence[Size], rows: sympy.Symbol) -> Openings:
    """The dimensions of an output that vary, as the loss takes it."""
    return {
        dimension: ROWS_OPEN if dimension == 0 and size == rows else OPEN_IF_POSSIBLE
        for dimension, size in enumerate(shape)
        if not isinstance(size, int)
    }


def _follows(theirs: Size, ours: Size, same: dict[sympy.Basic, sympy.Basic]) -> bool:
    """Whether a size in the loss's trace is what it is in the forward's, given what its symbols are.

    One symbol that nothing is known of yet, a length that the loss flattens into the rows, is found so.
    """
    if isinstance(theirs, int) or isinstance(ours, int):
        return theirs == ours
    if theirs.xreplace(same) == ours:
        return True
    unknown = [symbol for symbol in symbols_of(theirs) if symbol not in same]
    for symbol in symbols_of(ours) if len(unknown) == 1 else ():
        if theirs.xreplace({**same, unknown[0]: symbol}) == ours:
            same[unknown[0]] = symbol
            return True
    return False


class _Ties:
    """sizes: what each dimension is in every graph. fixed: open sizes that must be the example's all the same."""

    def __init__(self) -> None:
        self.sizes: dict[Place, Size] = {}
        self.fixed: set[Any] = set()

    @property
    def places(self) -> dict[Place, sympy.Symbol]:
        """The dimensions that are an open size."""
        return {place: size for place, size in self.sizes.items() if isinstance(size, sympy.Symbol)}

    def put(self, place: Place, size: Size, rows: sympy.Symbol) -> None:
        """One more graph says what a dimension is: a number, an open size, or something that follows from such."""
        self.require(rows not in symbols_of(size))
        known = self.sizes.setdefault(place, size)
        if known != size:
            self.fixed |= symbols_of(known) | symbols_of(size)
        elif not isinstance(size, sympy.Symbol):
            self.fixed |= symbols_of(size)

    @staticmethod
    def require(holds: bool) -> None:
        if not holds:
            raise LengthsNotOpen("rows are the size of something else, too")


def _bounds(sizes: OpenSizes, same: Mapping[sympy.Basic, sympy.Basic]) -> Iterator[tuple[Any, Bounds]]:
    """The range of each open size, under its new name."""
    for symbol, values in sizes.ranges.items():
        yield same.get(symbol, symbol), (int(values.lower), None if values.upper == int_oo else int(values.upper))


def _intersected(bounds: Iterable[tuple[Any, Bounds]]) -> dict[Any, Bounds]:
    found: dict[Any, Bounds] = {}
    for symbol, (least, largest) in bounds:
        other_least, other_largest = found.get(symbol, (least, None))
        tops = [top for top in (largest, other_largest) if top is not None]
        found[symbol] = (max(least, other_least), min(tops, default=None))
    return found


def _new_name(dimension: int, taken: Any) -> str:
    """ "size_1" for dimension 1; another of that dimension is "size_1_2"."""
    name, count = f"size_{dimension}", 1
    while name in set(taken):
        count += 1
        name = f"size_{dimension}_{count}"
    return name
