"""How batches are spread by ranks that go on from a saved state."""

from __future__ import annotations

from typing import Any, cast

import pytest

from gradwire_proto.values import LeafRef, ModelState, SplitDecision, TensorSpec, Variant
from gradwire_workers.group_variants import GroupVariants


class TwoRanks(list[Any]):
    on_lost = None


def state(ranks: int, *, own_statistics: bool = False) -> ModelState:
    """Saved from so many ranks, which had found that rows are independent."""
    split = SplitDecision(
        whole=None, inputs_whole=False, returns_loss=False, loss="a mean", weight=None, own_statistics=own_statistics
    )
    return ModelState(
        tensors={},
        optimizer=None,
        step=0,
        command=0,
        trained=(),
        held=(None,) * ranks,
        splits={"train": split},
        opened=(),
        threads=1,
    )


def group_of_two() -> GroupVariants:
    variant = Variant(
        name="train",
        training=True,
        graph=None,
        graph_inputs=(),
        input_structure=LeafRef(0),
        input_leaves=(TensorSpec("float32", ("rows", 2)),),
        output_structure=LeafRef(0),
        symbols=(),
    )
    return GroupVariants(cast(Any, TwoRanks([None, None])), [variant], require_sharding=False)


@pytest.mark.parametrize(("ranks", "mode"), [(1, "whole"), (2, "rows"), (3, "rows")])
def test_only_what_several_ranks_found_is_believed_by_several(ranks: int, mode: str) -> None:
    group = group_of_two()
    group.resume(state(ranks))
    assert group.sharding.mode == mode
    assert (group.splits["train"].whole is None) == (mode == "rows")


@pytest.mark.parametrize("own_statistics", [True, False])
def test_batch_norm_of_each_ranks_own_rows_is_said_in_the_sharding(own_statistics: bool) -> None:
    group = group_of_two()
    group.resume(state(2, own_statistics=own_statistics))
    assert ("sync_batch_norm=False" in group.sharding.reason) is own_statistics
    assert "the loss is a mean" in group.sharding.reason and group.sharding.mode == "rows"
