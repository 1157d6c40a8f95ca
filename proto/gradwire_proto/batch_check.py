"""Which variant of a program a batch fits, and what is wrong with a batch that fits none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gradwire_proto.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import (
    ROWS,
    Batch,
    ConstantSpec,
    Leaf,
    LeafRef,
    Structure,
    Symbol,
    TensorData,
    TensorSpec,
    Value,
    Variant,
)

# How far a batch got in a variant: the mismatch of the variant where it got farthest is the one worth telling.
_CLOSENESS = (
    "STRUCTURE_MISMATCH",
    "CONSTANT_MISMATCH",
    "DTYPE_MISMATCH",
    "SHAPE_MISMATCH",
    "ROWS_MISMATCH",
    "BATCH_EMPTY",
)


def select_variant(variants: Sequence[Variant], batch: Batch, *, training: bool, targets: bool) -> tuple[Variant, int]:
    """(the first variant of the mode that the batch fits, its number of rows); 0 rows for a variant without rows.

    Leaves are TensorData and constants. `targets`: whether the call has targets at all (forward has none).
    Raises InvalidArgument about the closest variant, with the leaf's path as the field, and FailedPrecondition
    (NO_VARIANT) where the program has no variant of the mode.
    """
    closest: InvalidArgument | None = None
    for variant in variants:
        if variant.training is not training:
            continue
        try:
            return variant, check_batch(variant, batch, targets=targets)
        except InvalidArgument as mismatch:
            if closest is None or _closeness(mismatch) > _closeness(closest):
                closest = mismatch
    if closest is not None:
        raise closest
    mode = "training" if training else "eval"
    raise FailedPrecondition(f"the program has no {mode} variant: add one first", reason="NO_VARIANT")


def _closeness(mismatch: InvalidArgument) -> int:
    return _CLOSENESS.index(mismatch.reason)


def check_batch(variant: Variant, batch: Batch, *, targets: bool = True, field: str = "batch") -> int:
    """The batch's number of rows, after checking that it fits the variant; 0 for a variant without rows."""
    check = _BatchCheck(variant.symbols)
    check.leaves(variant.input_structure, variant.input_leaves, batch.inputs, f"{field}.inputs")
    if targets:
        check.leaves(variant.target_structure, variant.target_leaves, batch.targets, f"{field}.targets")
    check.bounds()
    return check.sizes.get(ROWS, (0, ""))[0]


def flatten(structure: Structure, value: Value, field: str) -> list[Any]:
    """The leaves of `value` by their index in `structure`, whatever the order of its dicts.

    Raises InvalidArgument (STRUCTURE_MISMATCH) that names the first name or position that is missing or too many.
    """
    return [leaf for _, leaf in _paired(structure, value, field)]


def _paired(structure: Structure, value: Value, field: str) -> list[tuple[str, Any]]:
    """(path, leaf) by the leaf's index in the structure."""
    found: list[tuple[int, str, Any]] = []
    _walk(structure, value, field, found)
    found.sort(key=lambda item: item[0])
    return [(path, leaf) for _, path, leaf in found]


def _walk(structure: Any, value: Any, field: str, found: list[tuple[int, str, Any]]) -> None:
    if isinstance(structure, LeafRef):
        if value is None or isinstance(value, (tuple, list, dict)):
            raise _structure_mismatch(structure, value, field)
        found.append((structure.index, field, value))
    elif structure is None:
        if value is not None:
            raise _structure_mismatch(structure, value, field)
    elif type(structure) is not type(value):
        raise _structure_mismatch(structure, value, field)
    elif isinstance(structure, dict):
        for key in structure:
            if key not in value:
                raise _mismatch(f"{field}.{key}", "is missing", "STRUCTURE_MISMATCH")
        for key in value:
            if key not in structure:
                known = ", ".join(structure) or "none"
                raise _mismatch(f"{field}.{key}", f"unexpected name; expected {known}", "STRUCTURE_MISMATCH")
        for key, item in structure.items():
            _walk(item, value[key], f"{field}.{key}", found)
    else:
        if len(value) < len(structure):
            path = f"{field}[{len(value)}]"
            raise _mismatch(path, f"is missing; expected {_describe(structure)}", "STRUCTURE_MISMATCH")
        if len(value) > len(structure):
            path = f"{field}[{len(structure)}]"
            raise _mismatch(path, f"unexpected; expected {_describe(structure)}", "STRUCTURE_MISMATCH")
        for index, item in enumerate(structure):
            _walk(item, value[index], f"{field}[{index}]", found)


class _BatchCheck:
    """Leaves against their specs. `sizes`: symbol -> (its size in this batch, the leaf that set it)."""

    def __init__(self, symbols: Iterable[Symbol]) -> None:
        self._symbols = {symbol.name: symbol for symbol in symbols}
        self.sizes: dict[str, tuple[int, str]] = {}

    def leaves(self, structure: Structure, specs: Sequence[Leaf], value: Value, field: str) -> None:
        """Check all leaves below `field`; types and ranks of all before any size, so that closeness is comparable."""
        pairs = list(zip(_paired(structure, value, field), specs, strict=True))
        for (path, leaf), spec in pairs:
            _check_type(spec, leaf, path)
        for (path, leaf), spec in pairs:
            if isinstance(spec, TensorSpec):
                self._check_sizes(spec, leaf, path)

    def _check_sizes(self, spec: TensorSpec, leaf: TensorData, path: str) -> None:
        for expected, size in zip(spec.shape, leaf.shape, strict=True):
            if not isinstance(expected, str):
                if size != expected:
                    raise _leaf_mismatch(spec, leaf, path, "SHAPE_MISMATCH")
                continue
            known, first = self.sizes.setdefault(expected, (size, path))
            if size == known:
                continue
            if expected == ROWS:
                raise _mismatch(path, f"expected {known} rows, as {first} has; got {size}", "ROWS_MISMATCH")
            message = f"expected {_describe(spec)} with {expected} = {known}, as in {first}; got {_describe(leaf)}"
            raise _mismatch(path, message, "SHAPE_MISMATCH")

    def bounds(self) -> None:
        """Check every symbol's size against its bounds."""
        for name, (size, path) in self.sizes.items():
            symbol = self._symbols.get(name)
            if symbol is None or (symbol.min <= size and (symbol.max is None or size <= symbol.max)):
                continue
            if name == ROWS and size == 0:
                raise _mismatch(path, f"expected at least {symbol.min} rows, got 0", "BATCH_EMPTY")
            bounds = f"at least {symbol.min}" if symbol.max is None else f"from {symbol.min} to {symbol.max}"
            raise _mismatch(path, f"expected {name} {bounds}, got {size}", "SHAPE_MISMATCH")


def _check_type(spec: Leaf, leaf: Any, path: str) -> None:
    if isinstance(spec, ConstantSpec):
        # repr: NaN equals itself, and True is not 1.
        if repr(leaf) != repr(spec.value):
            message = f"expected the constant {spec.value!r}, which the graph has baked in; got {_describe(leaf)}"
            raise _mismatch(path, message, "CONSTANT_MISMATCH")
    elif not isinstance(leaf, TensorData):
        raise _leaf_mismatch(spec, leaf, path, "STRUCTURE_MISMATCH")
    elif leaf.dtype != spec.dtype:
        raise _leaf_mismatch(spec, leaf, path, "DTYPE_MISMATCH")
    elif len(leaf.shape) != len(spec.shape):
        raise _leaf_mismatch(spec, leaf, path, "SHAPE_MISMATCH")


def _describe(thing: Any) -> str:
    """`float32[rows, 10]`, `a tuple of 2`, `nothing`: for messages."""
    if isinstance(thing, (TensorSpec, TensorData)):
        return f"{thing.dtype}[{', '.join(map(str, thing.shape))}]"
    if isinstance(thing, (tuple, list)):
        return f"a {type(thing).__name__} of {len(thing)}"
    if isinstance(thing, dict):
        return f"a dict of {', '.join(thing) or 'nothing'}"
    if isinstance(thing, LeafRef):
        return "a tensor or constant"
    return "nothing" if thing is None else f"the constant {thing!r}"


def _mismatch(path: str, message: str, reason: str) -> InvalidArgument:
    return InvalidArgument(message, field=path, reason=reason)


def _leaf_mismatch(spec: TensorSpec, leaf: Any, path: str, reason: str) -> InvalidArgument:
    return _mismatch(path, f"expected {_describe(spec)}, got {_describe(leaf)}", reason)


def _structure_mismatch(structure: Any, value: Any, path: str) -> InvalidArgument:
    return _mismatch(path, f"expected {_describe(structure)}, got {_describe(value)}", "STRUCTURE_MISMATCH")
