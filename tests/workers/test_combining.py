"""Results are put together from the ranks' answers, and no file of an answer outlives that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import LeafRef, TensorData, TensorSpec, Variant
from gradwire_workers import segments
from gradwire_workers.combining import forward_result, gradient_result
from gradwire_workers.ranks import Answers
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.shard import Shard

SECONDS = {"compute": 0.1, "all_reduce": 0.0, "optimizer": 0.0}
ONE = LeafRef(0)
VARIANT = Variant(
    name="eval",
    training=False,
    graph=None,
    graph_inputs=(),
    input_structure=ONE,
    input_leaves=(TensorSpec("float32", ("rows", 2)),),
    output_structure=ONE,
)
SHARDS = [
    Shard(variant="eval", rows=4, start=start, stop=start + 2, inputs=(), targets=()) for start in (0, 2)
]  # two ranks of two rows each


def answers(folder: Path) -> Answers:
    """Each rank's tensors in a file of its own."""
    fields = []
    for rank in range(2):
        tensors = [torch.full((2, 2), float(rank)) for _ in range(3)]
        gradient, of_input, output = SegmentWriter(folder, f"rank-{rank}").write(map(from_torch, tensors))
        fields.append(
            {
                "loss": 0.5,
                "step": 1,
                "rows": 2,
                "gradients": {"w": gradient},
                "input_gradients": [of_input],
                "outputs": [output],
                "seconds": SECONDS,
            }
        )
    return Answers(fields=fields, transfer=0.0, total=0.1)


class FailsAt(SegmentWriter):
    """The `count`-th write fails."""

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, "frontend")
        self._left = count

    def write(self, tensors) -> list[TensorData]:
        self._left -= 1
        if not self._left:
            raise OSError("no")
        return super().write(tensors)


async def test_what_is_put_together_is_all_that_is_left(tmp_path):
    result = await forward_result(answers(tmp_path), VARIANT, SHARDS, SegmentWriter(tmp_path, "frontend"))
    assert to_torch(result.outputs).tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]
    assert [path.name for path in tmp_path.iterdir()] == ["frontend-1"]
    segments.release(result.outputs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("count", [1, 2])
async def test_when_gradients_cannot_be_put_together_no_file_is_left(tmp_path, count):
    with pytest.raises(OSError, match="no"):
        await gradient_result(answers(tmp_path), VARIANT, SHARDS, 4, FailsAt(tmp_path, count))
    assert not list(tmp_path.iterdir())


async def test_when_outputs_cannot_be_put_together_no_file_is_left(tmp_path):
    with pytest.raises(OSError, match="no"):
        await forward_result(answers(tmp_path), VARIANT, SHARDS, FailsAt(tmp_path, 1))
    assert not list(tmp_path.iterdir())
