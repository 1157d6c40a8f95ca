"""What a rank does when its answer cannot go out. The rank is here, without a process of its own and without Ray."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.export import ModuleExporter
from gradwire.functions import export_function
from gradwire_proto.codec import encode_model_spec, encode_program
from gradwire_proto.errors import InternalError, InvalidArgument
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import GradientQuery, Limits, ModelSpec
from gradwire_workers.rank_commands import RankCommands
from gradwire_workers.shard import Shard, shard_fields

ROWS = 70_000  # so many that the outputs do not fit into the message


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the rank's files are to go."""
    folder = tmp_path / "memory"
    folder.mkdir()
    return folder


@pytest.fixture
def rank(folder: Path) -> RankCommands:
    return RankCommands("rank-x", str(folder))


def shard_of(variant: str, rows: int, *inputs: torch.Tensor) -> dict[str, Any]:
    values: Any = from_nested(inputs)
    return shard_fields(
        Shard(variant=variant, rows=rows, start=0, stop=rows, whole=True, inputs=tuple(values), targets=())
    )


def load(rank: RankCommands, module: nn.Module, example: torch.Tensor) -> None:
    exported = ModuleExporter(module, None).export_model(example, None)
    rank.answer(
        "load",
        {
            "spec": encode_model_spec(ModelSpec(program=exported.program, loss=None)).SerializeToString(),
            "tensors": {name: from_any(tensor) for name, tensor in exported.tensors.items()},
            "device": "cpu",
            "rank": 0,
            "size": 1,
            "threads": 1,
            "limits": asdict(Limits()),
            "weights_folder": None,
            "kernels_folder": None,
            "gpus": (),
            "saved": None,
        },
    )
    rank.answer("start", {})


def test_a_forward_whose_outputs_cannot_be_written_is_told_as_applied(rank, folder):
    x = torch.randn(ROWS, 4)
    load(rank, nn.BatchNorm1d(4), x[:4])
    shutil.rmtree(folder)
    fields = {"shard": shard_of("train", ROWS, x), "training": True, "seed": None, "command": 1}
    with pytest.raises(InternalError, match="No such file") as caught:
        rank.answer("forward", fields)
    assert caught.value.outcome == "applied"
    (count,) = rank.answer("state_dict", {"names": ["num_batches_tracked"]})["tensors"].values()
    assert bytes(count.data) == (1).to_bytes(8, "little")


def test_a_command_that_fails_before_its_end_is_told_as_not_applied(rank):
    load(rank, nn.BatchNorm1d(4), torch.randn(4, 4))
    fields = {"shard": shard_of("train", 3, torch.randn(3, 5)), "training": True, "seed": None, "command": 1}
    with pytest.raises(InvalidArgument) as caught:
        rank.answer("forward", fields)
    assert caught.value.outcome == "not_applied"


def test_what_no_message_holds_is_refused_by_its_place(rank):
    rank._commands["look"] = lambda _: {"outputs": [1.0, torch.float32]}
    with pytest.raises(InvalidArgument, match=r"outputs\[1\]: the program gives a dtype") as caught:
        rank.answer("look", {})
    assert (caught.value.reason, caught.value.outcome) == ("OUTPUT_UNSUPPORTED", "applied")


def test_a_function_whose_answer_does_not_go_out_is_not_remembered(rank, folder):
    x = torch.randn(400_000)
    exported = export_function(lambda x: (x * x).sum(), (x,))
    query = GradientQuery(wrt=(), input_gradients=True, outputs=True, training=False)
    again = {
        "digest": exported.spec.digest,
        "forget": [],
        "shard": shard_of("eval", 1, x),
        "query": asdict(query),
        "command": 0,
        "device": "cpu",
        "threads": 1,
        "limits": asdict(Limits()),
        "weights_folder": None,
        "kernels_folder": None,
    }
    program = encode_program(exported.spec.program).SerializeToString()
    first = {**again, "program": program, "tensors": {}, "output_leaf": 0}
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError):
        rank.answer("compute_function", first)
    assert len(rank._functions) == 0
    folder.mkdir()
    rank.answer("compute_function", first)
    rank.answer("compute_function", again)
    assert len(rank._functions) == 1
