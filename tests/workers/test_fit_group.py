"""Fits on ranks without Ray: the same bits as one train_step after another, and what torch computes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import zmq
from torch import nn

from gradwire.export import ModuleExporter
from gradwire_proto.codec import encode_model_spec
from gradwire_proto.errors import GradwireError
from gradwire_proto.tensors import from_any, from_nested, to_torch
from gradwire_proto.values import Batch, DatasetInfo, FitSteps, Limits, ModelSpec, OptimizerSpec
from gradwire_workers.group_variants import GroupVariants
from gradwire_workers.pool.rank_process import RankProcess
from gradwire_workers.rank_channel import RankChannel
from gradwire_workers.ranks import Ranks
from gradwire_workers.segments import SegmentWriter
from gradwire_workers.worker_group import WorkerGroup

pytestmark = pytest.mark.asyncio(loop_scope="module")

MakeGroup = Callable[..., Awaitable[WorkerGroup]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channels(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Path, list[RankChannel]]]:
    """Three ranks, connected as the launcher does it."""
    folder = tmp_path_factory.mktemp("ranks")
    context = zmq.Context()
    endpoints = [f"ipc://{folder}/{number}.sock" for number in range(3)]
    script = Path(__file__).with_name("rank_without_ray.py")
    processes = [
        subprocess.Popen([sys.executable, script, endpoint, str(folder)], stdout=subprocess.PIPE, text=True)
        for endpoint in endpoints
    ]
    for process in processes:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "serving\n"
    channels = [RankChannel(context, endpoint, "rank-x") for endpoint in endpoints]
    yield folder, channels
    for channel in channels:
        channel.close()
    for process in processes:
        await asyncio.to_thread(process.wait, 5)
        process.communicate()
    context.destroy(linger=0)


@pytest_asyncio.fixture(loop_scope="module")
async def make_group(channels: tuple[Path, list[RankChannel]], tmp_path: Path) -> AsyncIterator[MakeGroup]:
    """make_group(module, loss, x, y, ranks, **spec): a model on so many ranks. One at a time."""
    folder, all_channels = channels

    def end(process: RankProcess) -> asyncio.Task[None]:
        raise AssertionError("nothing ends here")

    async def release(reuse: bool) -> None:
        """The fixture of the ranks ends them."""

    async def make(module: nn.Module, loss: Any, x: Any, y: Any, ranks: int = 2, **spec: Any) -> WorkerGroup:
        members = Ranks([RankProcess(channel, process_id=0, end=end) for channel in all_channels[:ranks]])
        exported = ModuleExporter(module, loss).export_model(x, y)
        optimizer = spec.pop("optimizer", OptimizerSpec("SGD", {"lr": 0.1, "momentum": 0.9}))
        model = ModelSpec(program=exported.program, loss=exported.loss, optimizer=optimizer, workers=ranks, **spec)
        common = {
            "spec": encode_model_spec(model).SerializeToString(),
            "tensors": {name: from_any(tensor) for name, tensor in exported.tensors.items()},
            "device": "cpu",
            "size": ranks,
            "threads": 1,
            "limits": asdict(Limits()),
            "weights_folder": None,
            "kernels_folder": None,
            "gpus": (),
            "saved": None,
        }
        place = folder / f"group-{id(members)}-{next(_NUMBERS)}"
        place.mkdir()
        await members.call("reset", [{}] * ranks, changes=False)
        await members.call("load", [{**common, "rank": rank} for rank in range(ranks)], changes=False)
        await members.call(
            "start", [{"folder": str(place), "generation": members.next_generation()}] * ranks, changes=False
        )
        group = WorkerGroup(
            ranks=members,
            variants=GroupVariants(members, model.program.variants, require_sharding=False),
            device="cpu",
            writer=SegmentWriter(folder, f"frontend-{next(_NUMBERS)}"),
            release=release,
        )
        await group.prepare(Batch(from_nested(exported.example.inputs), from_nested(exported.example.targets)))
        return group

    yield make
    for channel in all_channels:
        with suppress(GradwireError):
            await channel.call("reset", {})


INFO = DatasetInfo(id="d", inputs=None, targets=None, num_examples=1, nbytes=0, created_at=0.0)
_NUMBERS = iter(range(1_000_000))


def network(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.ReLU(), nn.Linear(8, 3))


def examples(rows: int = 23) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(rows, 6), torch.randint(0, 3, (rows,))


def stored(folder: Path, x: Any, y: Any) -> Batch:
    """The examples in a file, as the service keeps them."""
    writer = SegmentWriter(folder, f"dataset-{next(_NUMBERS)}")
    return Batch(*writer.write([from_any(x), from_any(y)]))


def batches(rows: int, size: int, steps: int, orders: Callable[[int], torch.Tensor]) -> list[torch.Tensor]:
    """The rows of each step's batch."""
    per_epoch = -(-rows // size)
    return [orders(step // per_epoch)[step % per_epoch * size :][:size] for step in range(steps)]


async def weights_of(group: WorkerGroup) -> dict[str, torch.Tensor]:
    state, _ = await group.state_dict(None)
    return {name: to_torch(tensor).clone() for name, tensor in state.items()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("ranks", "shuffled"), [(1, False), (1, True), (2, False), (3, True)])
async def test_fit_gives_the_bits_of_train_steps_on_the_same_batches(make_group, tmp_path, ranks, shuffled):
    (x, y), size, steps = examples(), 5, 12  # 5 batches an epoch, the last of 3 rows
    found = []
    group = await make_group(network(0.2), nn.CrossEntropyLoss(), x, y, ranks)
    if shuffled:
        raw = await group.fitting.orders(len(x), [7, 8, 9])
        expected = [torch.randperm(len(x), generator=torch.Generator().manual_seed(7 + epoch)) for epoch in range(3)]
        assert [torch.frombuffer(bytearray(each), dtype=torch.int32).tolist() for each in raw] == [
            each.tolist() for each in expected
        ]
    else:
        expected = [torch.arange(len(x))] * 3
    rows = batches(len(x), size, steps, lambda epoch: expected[epoch])
    for command, of_step in enumerate(rows, 1):
        result = await group.train_step(Batch(from_any(x[of_step]), from_any(y[of_step])), command=command)
        found.append(result.loss)
    after = await weights_of(group)

    fitted = await make_group(network(0.2), nn.CrossEntropyLoss(), x, y, ranks)
    dataset, losses = stored(tmp_path, x, y), []
    for first, count in ((0, 4), (4, 1), (5, 7)):
        packed = torch.cat(rows[first : first + count]).to(torch.int32).numpy().tobytes() if shuffled else b""
        asked = FitSteps(fit="f", dataset=INFO, first_step=first, steps=count, batch_size=size, rows=packed)
        result = await fitted.fitting.run(dataset, asked, command=first + 1)
        assert result.error is None and len(result.losses) == count
        losses += result.losses
    assert result.step == steps
    assert losses == found
    assert same_bits(await weights_of(fitted), after)


def asked(first: int, steps: int, size: int = 5) -> FitSteps:
    return FitSteps(fit="f", dataset=INFO, first_step=first, steps=steps, batch_size=size)


@pytest.mark.parametrize("ranks", [1, 2])
async def test_step_that_one_rank_refuses_ends_the_run_on_all_and_those_before_stay(make_group, tmp_path, ranks):
    x, y = examples()
    wrong = y.clone()
    wrong[3 * 5] = 7  # In the first half of the fourth batch: the other rank sees nothing of it.
    group = await make_group(network(), nn.CrossEntropyLoss(), x, y, ranks)
    result = await group.fitting.run(stored(tmp_path, x, wrong), asked(0, 5), command=1)
    assert result.error is not None and result.error.reason == "TARGET_OUT_OF_RANGE"
    assert (len(result.losses), result.step) == (3, 3)
    after = await weights_of(group)
    # The first step's refusal is the command's, and nothing was applied.
    with pytest.raises(GradwireError) as caught:
        await group.fitting.run(stored(tmp_path, x, wrong), asked(3, 2), command=4)
    assert (caught.value.reason, caught.value.outcome) == ("TARGET_OUT_OF_RANGE", "not_applied")
    assert same_bits(await weights_of(group), after)
    last = await group.train_step(Batch(from_any(x[:5]), from_any(y[:5])), command=4)

    plain = await make_group(network(), nn.CrossEntropyLoss(), x, y, ranks)
    rows = batches(len(x), 5, 3, lambda _: torch.arange(len(x)))
    losses = [
        (await plain.train_step(Batch(from_any(x[each]), from_any(y[each])), command=number)).loss
        for number, each in enumerate(rows, 1)
    ]
    assert list(result.losses) == losses
    assert (await plain.train_step(Batch(from_any(x[:5]), from_any(y[:5])), command=4)).loss == last.loss
    assert same_bits(await weights_of(group), await weights_of(plain))


async def test_most_bounds_what_is_applied_once_more(make_group, tmp_path):
    x, y = examples()
    group = await make_group(network(), nn.CrossEntropyLoss(), x, y, 2)
    result = await group.fitting.run(stored(tmp_path, x, y), asked(0, 5), most=2, command=1)
    assert (len(result.losses), result.step, group.applied) == (2, 2, 1)
    # What was let go of is mapped again.
    await group.fitting.forget()
    rest = await group.fitting.run(stored(tmp_path, x, y), asked(2, 3), command=3)
    assert (len(rest.losses), rest.step, group.applied) == (3, 5, 2)


async def test_validation_is_the_mean_over_rows_and_changes_nothing(make_group, tmp_path):
    (x, y), net = examples(), network()
    group = await make_group(net, nn.CrossEntropyLoss(), x, y, 2)
    before = await weights_of(group)
    loss = await group.fitting.evaluate(stored(tmp_path, x, y), 5)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(net.eval()(x), y).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert same_bits(await weights_of(group), before)
