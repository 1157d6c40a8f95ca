"""What is known of a dataset of some examples, before they are written."""

from __future__ import annotations

import time
from dataclasses import replace

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.values import Batch, DatasetInfo, TensorData, Value, leaves, map_leaves

MOST_EXAMPLES = 2**31 - 1
"""Rows are numbered with 32 bits."""


def described(dataset_id: str, batch: Batch, ttl: float | None) -> DatasetInfo:
    """What is known of a dataset of these examples. InvalidArgument where they are none."""
    examples, nbytes = None, 0
    for path, leaf in (*leaves(batch.inputs, "batch.inputs"), *leaves(batch.targets, "batch.targets")):
        if not isinstance(leaf, TensorData):
            continue
        if not leaf.shape:
            raise InvalidArgument("expected a tensor with a row for each example", field=path, reason="DATASET_ROWS")
        if examples is None:
            examples = leaf.shape[0]
        if leaf.shape[0] != examples or not 0 < examples <= MOST_EXAMPLES:
            expected = f"{examples} rows, as the first tensor has" if examples else "at least one row"
            expected = expected if examples <= MOST_EXAMPLES else f"at most {MOST_EXAMPLES} rows"
            raise InvalidArgument(f"expected {expected}, got {leaf.shape[0]}", field=path, reason="DATASET_ROWS")
        nbytes += leaf.nbytes
    if examples is None:
        raise InvalidArgument("expected at least one tensor", field="batch.inputs", reason="DATASET_ROWS")
    if nbytes < examples:
        # All that is kept of a row beside it, such as its place in an order, is bounded by its bytes.
        message = f"expected at least a byte in each of {examples} rows, got {nbytes} bytes"
        raise InvalidArgument(message, field="batch.inputs", reason="DATASET_ROWS")
    return DatasetInfo(
        id=dataset_id,
        inputs=_without_bytes(batch.inputs),
        targets=_without_bytes(batch.targets),
        num_examples=examples,
        nbytes=nbytes,
        created_at=time.time(),
        ttl=ttl,
    )


def _without_bytes(value: Value) -> Value:
    return map_leaves(lambda leaf: replace(leaf, data=b"") if isinstance(leaf, TensorData) else leaf, value)
