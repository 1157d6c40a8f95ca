"""Compiled kernels are taken into use by a command: numbered, in the journal, and part of every checkpoint."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from server.brought_back import ready, save, steps

from gradwire_proto import codec
from gradwire_proto.errors import FailedPrecondition, RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import ArchitectureSpec, BatchShapes, CompiledKernels, TorchLossSpec

SHAPES = BatchShapes("train", ((1, 2),), ())
COMPILED = {"compile": True, "loss": TorchLossSpec("mse_loss")}


async def compiled(frontend: Any) -> list[CompiledKernels]:
    """What the model tells of its kernels."""
    return [codec.decode_compiled(each) for each in (await frontend.model()).compiled]


async def in_use(frontend: Any) -> None:
    """Wait until its kernels are in use."""
    async with asyncio.timeout(5):
        while await compiled(frontend) != [CompiledKernels(SHAPES, "in_use")]:
            await asyncio.sleep(0.01)


def swaps(workers: Any) -> list[Any]:
    """What the ranks were asked for, but for what says no more than that they are watched."""
    return [call for call in workers.calls if call[0] == "use_kernels"]


async def swapped(frontend: Any) -> Any:
    """A model that has taken a step, has then swapped kernels in, and has taken another step; its ranks."""
    workers = await frontend.create(**COMPILED)
    workers.kernels.ready = [SHAPES]
    await frontend.stub.TrainStep(frontend.train(b"a"))
    await in_use(frontend)
    await frontend.stub.TrainStep(frontend.train(b"b"))
    return workers


async def test_kernels_come_into_use_by_a_command_that_a_restart_applies_at_the_same_place(start: Any) -> None:
    async with start() as frontend:
        workers = await swapped(frontend)
        assert steps(workers) == [(b"a", 1), (b"b", 3)], "the swap is the second command"
        assert swaps(workers) == [("use_kernels", SHAPES, False)]
    async with start() as frontend:
        workers = await ready(frontend)
        assert [call[0] for call in workers.calls] == ["train_step", "use_kernels", "train_step"]
        assert steps(workers) == [(b"a", 1), (b"b", 3)]
        assert swaps(workers) == [("use_kernels", SHAPES, True)]
        assert await compiled(frontend) == [CompiledKernels(SHAPES, "in_use")]


async def test_checkpoint_holds_which_kernels_are_in_use(start: Any) -> None:
    async with start() as frontend:
        await swapped(frontend)
        await save(frontend, "best")
        await frontend.stub.RestoreModel(pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="again"))
        _, state = frontend.cluster.started[-1]
        assert state.kernels == (SHAPES,)
        assert (await frontend.model("again")).compile


async def test_ranks_that_take_the_place_of_lost_ones_are_told_which_kernels_are_in_use(start: Any) -> None:
    async with start() as frontend:
        workers = await swapped(frontend)
        workers.kept = replace(workers.now(), command=3)
        workers.on_lost(RankLost("rank 0 died"))
        await frontend.until(lambda: frontend.cluster.groups["m"] is not workers)
        await ready(frontend)
        _, state = frontend.cluster.started[-1]
        assert state.kernels == (SHAPES,)
        assert await compiled(frontend) == [CompiledKernels(SHAPES, "in_use")]


async def test_kernels_that_ranks_refuse_leave_no_command_and_are_not_tried_again(start: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create(**COMPILED)
        workers.kernels.ready = [SHAPES]
        workers.kernels.error = FailedPrecondition("they cannot be loaded", reason="KERNELS_REFUSED")
        await frontend.stub.TrainStep(frontend.train(b"a"))
        await frontend.until(lambda: workers.kernels.refused)
        await frontend.stub.TrainStep(frontend.train(b"b"))
        assert steps(workers) == [(b"a", 1), (b"b", 2)]
        assert [(each.state, each.reason) for each in await compiled(frontend)] == [
            ("refused", "they cannot be loaded")
        ]
        assert len(swaps(workers)) == 1


async def test_ranks_of_a_model_that_is_not_compiled_are_not_asked_for_kernels(start: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create(loss=TorchLossSpec("mse_loss"))
        workers.kernels.ready = [SHAPES]
        await frontend.stub.TrainStep(frontend.train(b"a"))
        await asyncio.sleep(0.6)
        assert not swaps(workers)
        assert not await compiled(frontend)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"loss": None}, "NO_LOSS"),
        ({"program": ArchitectureSpec(name="torch.nn.ReLU", config={})}, "COMPILE_UNFIT"),
    ],
)
async def test_what_can_never_be_compiled_is_refused_at_creation(
    start: Any, changes: dict[str, Any], reason: str
) -> None:
    async with start() as frontend:
        request = frontend.creation(**COMPILED | changes)
        if "program" in changes:
            request.ClearField("tensors")
        error = await frontend.error(frontend.stub.CreateModel(request))
        assert (error.reason, error.field) == (reason, "model.compile")
        assert not frontend.cluster.tries
