"""Variants of an architecture, made of the batches that come: its module takes every shape that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradwire_proto.batch_check import flatten
from gradwire_proto.codec import decode_variant, encode_variant
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import program_pb2
from gradwire_proto.values import (
    ROWS,
    Batch,
    ConstantSpec,
    Leaf,
    LeafRef,
    Limits,
    Structure,
    Symbol,
    TensorData,
    TensorSpec,
    Variant,
    in_key_order,
    leaves,
)
from gradwire_workers.ranks import Ranks


class OpenVariants:
    """Makes variants on the ranks of one model."""

    def __init__(self, ranks: Ranks, limits: Limits) -> None:
        self._ranks = ranks
        self._limits = limits

    async def open(self, batch: Batch, known: Sequence[Variant], *, training: bool, reads: bool = False) -> Variant:
        """A variant for batches like `batch`, which every rank has from then on. reads: for reads only.

        Raises InvalidArgument where the module does not take the batch, ResourceExhausted (TOO_MANY_VARIANTS) where
        `known` are as many as there may be.
        """
        if len(known) >= self._limits.variants and not self._ranks.again:
            raise ResourceExhausted(
                f"the batches of this model have been of {len(known)} kinds (in what they nest, in their types and"
                " constants), as many as the server's setting variants allows",
                field="batch",
                reason="TOO_MANY_VARIANTS",
            )
        name = f"{'read-' if reads else ''}{'train' if training else 'eval'}-{len(known)}"
        variant = describe(batch, name=name, training=training)
        fields = {
            "variant": encode_variant(variant).SerializeToString(),
            "inputs": tuple(flatten(variant.input_structure, batch.inputs, "batch.inputs")),
        }
        answers = await self._ranks.call("open_variant", [fields] * len(self._ranks), changes=False)
        message = program_pb2.Variant.FromString(bytes(answers.fields[0]["variant"]))
        return decode_variant(message, require_graph=False)


def describe(batch: Batch, *, name: str, training: bool) -> Variant:
    """What batches like `batch` have in common: their nesting, element types and constants. Every size is open.
    Leaves are counted with dicts in the order of their keys.

    Rows are dimension 0 of the first input that has one, and of every leaf that has as many. What the module returns is
    not known yet.
    """
    batch = Batch(in_key_order(batch.inputs), in_key_order(batch.targets))
    found = [leaf for _, leaf in leaves(batch.inputs)]
    rows = next((leaf.shape[0] for leaf in found if isinstance(leaf, TensorData) and leaf.shape), None)
    if rows == 0:
        raise InvalidArgument("expected at least 1 rows, got 0", field="batch.inputs", reason="BATCH_EMPTY")
    symbols = [] if rows is None else [Symbol(ROWS, min=1)]
    return Variant(
        name=name,
        training=training,
        graph=None,
        graph_inputs=(),
        input_structure=_numbered(batch.inputs),
        input_leaves=_specs(batch.inputs, "input", rows, symbols),
        output_structure=None,
        symbols=tuple(symbols),
        target_structure=_numbered(batch.targets),
        target_leaves=_specs(batch.targets, "target", rows, symbols),
    )


def _specs(value: Any, prefix: str, rows: int | None, symbols: list[Symbol]) -> tuple[Leaf, ...]:
    specs: list[Leaf] = []
    for index, (_, leaf) in enumerate(leaves(value)):
        if not isinstance(leaf, TensorData):
            specs.append(ConstantSpec(leaf))
            continue
        shape = []
        for dimension, size in enumerate(leaf.shape):
            if dimension == 0 and size == rows:
                shape.append(ROWS)
                continue
            shape.append(f"{prefix}{index}.{dimension}")
            symbols.append(Symbol(shape[-1]))
        specs.append(TensorSpec(leaf.dtype, tuple(shape)))
    return tuple(specs)


def _numbered(value: Any) -> Structure:
    """How a value is nested, its leaves numbered in the order of `leaves`."""
    count = 0

    def walk(item: Any) -> Structure:
        nonlocal count
        if isinstance(item, tuple):
            return tuple(map(walk, item))
        if isinstance(item, list):
            return [walk(each) for each in item]
        if isinstance(item, dict):
            return {key: walk(each) for key, each in item.items()}
        if item is None:
            return None
        count += 1
        return LeafRef(count - 1)

    return walk(value)
