"""No Ray call and no pickle on the path of a step: not in the frontend, not in a rank.

The ranks here are processes in which Ray cannot even be imported, and in every process a tripwire watches all calls.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytest_asyncio
import torch
import zmq
from torch import nn
from torch_forks import TorchForks

from gradwire.export import ModuleExporter
from gradwire_proto.codec import encode_model_spec
from gradwire_proto.tensors import from_any, from_nested
from gradwire_proto.values import Batch, GradientQuery, Limits, ModelSpec, OptimizerSpec
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.rank_channel import RankChannel
from gradwire_workers.ranks import Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.worker_group import WorkerGroup

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.syspath_prepend(Path(__file__).parent)
    module: ModuleType = __import__("tripwire")
    return module.tripwire


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ranks(folder: Path, torch_forks: TorchForks) -> AsyncIterator[Ranks]:
    """Two ranks, connected as the launcher does it."""
    context = zmq.Context()
    endpoints = [f"ipc://{folder}/{number}.sock" for number in range(2)]
    script = Path(__file__).with_name("rank_without_ray.py")
    processes = [torch_forks.start(script, endpoint, str(folder)) for endpoint in endpoints]
    for process in processes:
        assert process.output.readline() == "serving\n"
    channels = [RankChannel(context, endpoint, "rank-x") for endpoint in endpoints]

    def end(process: RankProcess) -> asyncio.Task[None]:
        raise AssertionError("nothing ends here")

    yield Ranks([RankProcess(channel, process_id=0, end=end) for channel in channels])
    for channel in channels:
        channel.close()
    for process in processes:
        assert process.ends(5)
        process.close()
    context.destroy(linger=0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(ranks: Ranks, folder: Path) -> WorkerGroup:
    """A model on the two ranks, started with the cluster's commands."""
    x, y = torch.randn(4, 10), torch.randint(0, 3, (4,))
    exported = ModuleExporter(nn.Sequential(nn.Linear(10, 3), nn.BatchNorm1d(3)), nn.CrossEntropyLoss()).export_model(
        x, y
    )
    spec = ModelSpec(
        program=exported.program, loss=exported.loss, optimizer=OptimizerSpec("SGD", {"lr": 0.1}), workers=2
    )
    common = {
        "spec": encode_model_spec(spec).SerializeToString(),
        "tensors": {name: from_any(tensor) for name, tensor in exported.tensors.items()},
        "device": "cpu",
        "size": 2,
        "threads": 1,
        "limits": asdict(Limits()),
        "weights_folder": None,
        "kernels_folder": None,
        "gpus": (),
        "saved": None,
    }
    (folder / "group").mkdir()
    await ranks.call("load", [{**common, "rank": rank} for rank in range(2)])
    await ranks.call("start", [{"folder": str(folder / "group"), "generation": ranks.next_generation()}] * 2)

    async def release(reuse: bool) -> None:
        """The fixture of the ranks ends them."""

    group = WorkerGroup(
        ranks=ranks,
        variants=GroupVariants(ranks, spec.program.variants, require_sharding=True),
        device="cpu",
        writer=SegmentWriter(folder, "frontend"),
        release=release,
    )
    await group.prepare(Batch(from_nested(exported.example.inputs), from_nested(exported.example.targets)))
    return group


async def test_steps_and_reads_use_neither_ray_nor_pickle(group, tripwire):
    inputs = torch.randn(7, 10)
    batch = Batch(from_any(inputs), from_any(torch.randint(0, 3, (7,))))
    with tripwire() as trips:
        for command in range(3):
            result = await group.train_step(batch, command=command)
        await group.forward_backward(batch, command=4)
        await group.optimizer_step(None)
        await group.zero_grad()
        await group.compute_gradients(batch, GradientQuery(outputs=True, input_gradients=True))
        await group.forward(batch.inputs, training=False, seed=None, command=0)
        await group.load_state_dict((await group.state_dict(None))[0], partial=False)
    assert result.rank_rows == (4, 3)
    assert trips == []


async def test_the_tripwire_notices_pickle_on_both_sides(ranks, tripwire):
    answer = await ranks.processes[0].call("pickle")
    assert answer.error.reason == "TRIPPED"
    with tripwire() as trips:
        pickle.dumps([1])
    assert trips == ["_pickle.dumps"]
