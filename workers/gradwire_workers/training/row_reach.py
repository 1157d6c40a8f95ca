"""Whether a row of a batch reaches others, by a mark on it: whatever the numbers are, but for one number of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from gradwire_proto.errors import GradwireError
from gradwire_proto.values import ROWS, Variant
from gradwire_workers.shard import Shard
from gradwire_workers.sharding import has_rows
from gradwire_workers.training.closeness import has_rounding
from gradwire_workers.training.replica import Replica
from gradwire_workers.training.row_examples import Change, changed
from gradwire_workers.training.row_marks import MarkedRow, rows_to_mark
from gradwire_workers.training.row_pass import PassResult, copied, is_not_taken, run_pass, weights_of_rows
from gradwire_workers.training.row_reasons import GRADIENTS, OUTPUTS
from gradwire_workers.training.snapshots import Snapshot


def where_rows_reach(replica: Replica, variant: Variant, inputs: Sequence[Any], change: Change) -> int:
    """Index of the reason for which the first or the last of some rows reaches others, as far as this rank looks.

    0 where it sees neither. The rows are shared out among the ranks, which do not wait for each other here.
    """
    groups = replica.groups
    assert groups is not None
    symbol = next(symbol for symbol in variant.symbols if symbol.name == ROWS)
    sizes = {size for leaf in inputs if isinstance(leaf, Tensor) for size in leaf.shape[1:]}
    sizes |= {size for tensor in replica.program.all_state().values() for size in tensor.shape}
    rows = rows_to_mark(max(symbol.min, 2), symbol.max, sizes)
    if rows is None:
        return 0
    if groups.rank >= 2:
        return 0
    leaves = changed(change, variant, inputs, rows)
    shard = Shard(variant=variant.name, rows=rows, start=0, stop=rows, whole=True, inputs=tuple(leaves), targets=())
    with replica.row_by_row():
        try:
            clean = run_pass(replica, shard, weights_of_rows)
        except Exception as error:
            if not is_not_taken(error):
                raise
            return 0
        for row in (0, rows - 1)[groups.rank :: groups.size]:
            try:
                if reason := _where_row_reaches(replica, shard, variant, MarkedRow(row=row, rows=rows), clean):
                    return reason
            except (RuntimeError, IndexError, GradwireError):
                # Some operators refuse what is not a number. What numbers have shown has to do.
                return 0
    return 0


def _where_row_reaches(replica: Replica, shard: Shard, variant: Variant, marked: MarkedRow, clean: PassResult) -> int:
    with_rows = [has_rows(spec) for spec in variant.input_leaves]
    inputs = [marked.put(leaf) if has else copied(leaf) for leaf, has in zip(shard.inputs, with_rows, strict=True)]
    whole_numbers = [leaf for leaf, has in zip(inputs, with_rows, strict=True) if has and not has_rounding(leaf)]
    before = Snapshot(replica.program.mutated_buffers(shard.variant))
    try:
        marked_shard = replace(shard, inputs=tuple(inputs))
        outputs, spread = marked.follow(lambda: replica.row_outputs(replica.outputs(marked_shard)), whole_numbers)
    finally:
        before.restore()
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    pairs = zip(tensors, clean.outputs, strict=True)
    if any(spread) or any(marked.has_spread(*pair) for pair in pairs if has_rounding(pair[0])):
        return OUTPUTS
    back = run_pass(replica, shard, lambda index, output: marked.put(weights_of_rows(index, output)))
    for index, gradient in back.inputs.items():
        reference = clean.inputs[index]
        if gradient is None or reference is None or not with_rows[index]:
            continue
        if marked.has_spread(gradient, reference):
            return GRADIENTS
    return 0
