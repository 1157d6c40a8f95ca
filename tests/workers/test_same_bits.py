"""The same command on the same state gives the same bits, whatever else the machine does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.codec import encode_model_spec
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.tensors import from_any, from_nested, from_torch
from gradwire_proto.values import Limits, ModelSpec, TensorData
from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.rank_tensors import leaves_in, owned
from gradwire_workers.shard import Shard, shard_fields


class Histogram(nn.Module):
    """Adds many numbers up at few places: in parallel, they come in another order every time."""

    def forward(self, index, values):
        return torch.zeros(50).index_put((index,), values, accumulate=True)


class Put(nn.Module):
    """torch has no deterministic kernel for this."""

    def forward(self, index, values):
        return torch.zeros(50).put(index, values)


@pytest.fixture
def rank(tmp_path, monkeypatch) -> Iterator[RankCommands]:
    """A rank without a process of its own. It computes with two threads."""
    # Torch's own test database, where another test has imported it, forbids what a rank sets.
    monkeypatch.setitem(torch.backends.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", True)
    rank = RankCommands("rank-x", str(tmp_path))
    try:
        yield rank
        rank.answer("reset", {})
    finally:
        torch.set_num_threads(1)


def load(rank: RankCommands, module: nn.Module, example: Any, **settings: Any) -> dict[str, Any]:
    """Returns the fields of a forward over the example."""
    exported = ModuleExporter(module, None).export_model(example, None)
    spec = ModelSpec(program=exported.program, loss=None, **settings)
    fields = {"device": "cpu", "rank": 0, "size": 1, "threads": 2, "limits": asdict(Limits()), "gpus": ()}
    fields |= {
        "spec": encode_model_spec(spec).SerializeToString(),
        "weights_folder": None,
        "kernels_folder": None,
        "saved": None,
    }
    rank.answer("load", {**fields, "tensors": {name: from_any(each) for name, each in exported.tensors.items()}})
    rank.answer("start", {})
    inputs: Any = from_nested(example)
    rows = len(example[0])
    shard = Shard(variant="train", rows=rows, start=0, stop=rows, whole=True, inputs=inputs, targets=())
    return {"shard": shard_fields(shard), "training": True, "seed": None, "command": 1}


def test_sums_at_equal_indices_come_out_the_same_on_several_threads(rank):
    torch.manual_seed(0)
    forward = load(rank, Histogram(), (torch.randint(0, 50, (300_000,)), torch.randn(300_000)))
    found = {bytes(rank.answer("forward", forward)["outputs"][0].data) for _ in range(10)}
    assert len(found) == 1


def test_a_deterministic_model_refuses_an_operator_that_has_no_such_kernel_and_others_take_it(rank):
    example = torch.arange(10), torch.randn(10)
    forward = load(rank, Put(), example, deterministic=True)
    with pytest.raises(InvalidArgument) as caught:
        rank.answer("forward", forward)
    assert (caught.value.reason, caught.value.field) == ("NOT_DETERMINISTIC", "model.deterministic")
    assert "put" in caught.value.message
    rank.answer("reset", {})
    assert not torch.are_deterministic_algorithms_enabled()
    (outputs,) = rank.answer("forward", load(rank, Put(), example))["outputs"]
    assert bytes(outputs.data)[:40] == bytes(from_torch(example[1]).data)


@pytest.mark.parametrize("offset", [0, 4, 8, 24])
def test_tensors_begin_where_torch_would_have_them_begin_wherever_they_stood_in_a_message(offset):
    values = torch.randn(100)
    message = bytearray(offset + 400)
    message[offset:] = bytes(from_torch(values).data)
    data = TensorData("float32", (100,), memoryview(message)[offset:])
    for tensor in (*leaves_in([data]), owned(data)):
        assert tensor.data_ptr() % 64 == 0
        assert torch.equal(tensor, values)
