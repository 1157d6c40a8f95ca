"""Rows go to ranks in order, as even as can be, without copies, and come back as one batch."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import Batch, ConstantSpec, LeafRef, Segment, Symbol, TensorData, TensorSpec, Variant
from gradwire_workers.sharding import combine_leaves, row_range, split
from gradwire_workers.training.seeds import command_seed, mixed_seed

VARIANT = Variant(
    name="train",
    training=True,
    graph=None,
    graph_inputs=(),
    input_structure={"x": LeafRef(0), "scale": LeafRef(1), "flag": LeafRef(2)},
    input_leaves=(TensorSpec("float64", ("rows", 3)), TensorSpec("float64", (3,)), ConstantSpec(True)),
    output_structure=LeafRef(0),
    target_structure=LeafRef(0),
    target_leaves=(TensorSpec("int64", ("rows",)),),
)


def batch(rows: int) -> tuple[Batch, torch.Tensor, torch.Tensor]:
    x, y = torch.randn(rows, 3).double(), torch.arange(rows)
    # In another order than the variant's.
    inputs = {"flag": True, "scale": from_torch(torch.randn(3).double()), "x": from_torch(x)}
    return Batch(inputs, from_torch(y)), x, y


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 7, 64])
def test_ranks_have_all_rows_once_in_order(rows, ranks):
    given, x, y = batch(rows)
    shards = split(VARIANT, rows, given, ranks=ranks, whole=False)
    counts = [shard.count for shard in shards]
    assert sum(counts) == rows and max(counts) - min(counts) <= 1 and counts == sorted(counts, reverse=True)
    own = [shard for shard in shards if shard.count]
    assert torch.equal(torch.cat([to_torch(shard.inputs[0]) for shard in own]), x)
    assert torch.equal(torch.cat([to_torch(shard.targets[0]) for shard in own]), y)
    for shard in shards:
        assert shard.inputs[2] is True and shard.inputs[1] == given.inputs["scale"]
        if not shard.count:
            assert torch.equal(to_torch(shard.inputs[0]), x[:1])
    combined = combine_leaves(shards, [[s.inputs[0] if s.count else _none(s.inputs[0])] for s in shards], None)
    assert torch.equal(to_torch(combined[0]), x)


def _none(dummy: TensorData) -> TensorData:
    return TensorData(dummy.dtype, (0, *dummy.shape[1:]), b"")


def test_slices_share_the_memory_of_the_message():
    given, x, _ = batch(4)
    second = split(VARIANT, 4, given, ranks=2, whole=False)[1]
    x[2:] = 7.0
    assert torch.equal(to_torch(second.inputs[0]), x[2:])


def test_rows_in_a_file_stay_in_the_file(tmp_path):
    x = torch.randn(5, 3).double()
    path = tmp_path / "rows"
    path.write_bytes(b"header.." + bytes(from_torch(x).data))
    data = TensorData("float64", (5, 3), Segment(str(path), 8, x.nbytes))
    given = Batch({"x": data, "scale": from_torch(x[0]), "flag": True}, from_torch(torch.arange(5)))
    shards = split(VARIANT, 5, given, ranks=2, whole=False)
    assert isinstance(shards[1].inputs[0].data, Segment)
    assert torch.equal(to_torch(shards[1].inputs[0]), x[3:])
    assert torch.equal(to_torch(combine_leaves(shards, [s.inputs for s in shards], VARIANT.input_leaves)[0]), x)


def test_whole_batch_goes_to_rank_0_and_the_others_are_idle():
    first, second = split(VARIANT, 4, batch(4)[0], ranks=2, whole=True)
    assert (first.count, first.idle, second.count, second.idle) == (4, False, 0, True)
    assert combine_leaves([first, second], [["result"], None], None) == ["result"]


@pytest.mark.parametrize(("rows", "ranks"), [(1, 2), (2, 2), (3, 2), (5, 3), (2, 5)])
def test_batch_runs_whole_where_a_rank_would_get_fewer_rows_than_the_variant_takes(rows, ranks):
    from_two = replace(VARIANT, symbols=(Symbol("rows", min=2),))
    first, *others = split(from_two, rows, batch(rows)[0], ranks=ranks, whole=False)
    assert first.whole and first.count == rows and all(shard.whole and shard.idle for shard in others)
    enough = split(from_two, 2 * ranks, batch(2 * ranks)[0], ranks=ranks, whole=False)
    assert [shard.count for shard in enough] == [2] * ranks


def test_row_ranges_meet():
    for rows in range(20):
        ranges = [row_range(rows, 7, rank) for rank in range(7)]
        assert ranges[0][0] == 0 and ranges[-1][1] == rows
        assert all(left[1] == right[0] for left, right in pairwise(ranges))


def test_seeds_differ_between_models_commands_and_ranks():
    seeds = {mixed_seed(model, command, rank) for model in range(10) for command in range(10) for rank in range(10)}
    assert len(seeds) == 1000
    assert command_seed(model_seed=0, command=1, rank=0, given=42) == 42
    assert command_seed(model_seed=0, command=1, rank=1, given=42) == command_seed(
        model_seed=9, command=9, rank=1, given=42
    )
