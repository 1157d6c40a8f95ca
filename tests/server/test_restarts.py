"""A frontend that is started again: its models come back with every acknowledged command, once."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from server.brought_back import get_command, ready, save, steps

from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

FAILED = model_pb2.MODEL_STATE_FAILED


async def test_model_comes_back_with_every_command_in_order_and_goes_on_with_the_next_number(start: Any) -> None:
    async with start() as frontend:
        await frontend.create(labels={"team": "vision"})
        for value in (b"a", b"b", b"c"):
            await frontend.stub.TrainStep(frontend.train(value))
        before = await frontend.model()
    async with start() as frontend:
        workers = await ready(frontend)
        assert steps(workers) == [(b"a", 1), (b"b", 2), (b"c", 3)]
        assert await frontend.model() == before
        assert (await frontend.stub.TrainStep(frontend.train(b"d"))).result.step == 4
        assert steps(workers)[-1] == (b"d", 4)


async def test_repeat_runs_once_across_a_restart_and_gets_the_first_reply(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        request = frontend.train(b"a", request_id=fakes.request_id())
        first = await frontend.stub.TrainStep(request)
        await frontend.stub.TrainStep(frontend.train(b"b"))
    async with start() as frontend:
        # At once: whether it is a repeat is known only when the model is back.
        assert await frontend.stub.TrainStep(request) == first
        assert steps(frontend.cluster.groups["m"]) == [(b"a", 1), (b"b", 2)]
        command = await frontend.stub.GetCommand(get_command(request.request_id))
        assert command.state == model_pb2.COMMAND_STATE_APPLIED
        error = await frontend.error(frontend.stub.TrainStep(frontend.train(b"x", request_id=request.request_id)))
        assert error.reason == "REQUEST_ID_REUSED"


async def test_refused_command_leaves_no_record(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        workers = await frontend.create()
        workers.error = InvalidArgument("no")
        request = frontend.train(b"a", request_id=fakes.request_id())
        await frontend.error(frontend.stub.TrainStep(request))
        workers.error = None
        await frontend.stub.TrainStep(frontend.train(b"b"))
    async with start() as frontend:
        assert steps(await ready(frontend)) == [(b"b", 1)]
        assert (await frontend.error(frontend.stub.GetCommand(get_command(request.request_id)))).reason == (
            "COMMAND_NOT_FOUND"
        )


async def test_repeat_of_a_creation_finds_the_model_that_it_made(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        request = frontend.creation("", request_id=fakes.request_id())
        first = await frontend.stub.CreateModel(request)
    async with start() as frontend:
        assert await frontend.stub.CreateModel(request) == first
        models = (await frontend.stub.ListModels(pb.ListModelsRequest())).models
        assert [model.name for model in models] == [first.name]


async def test_requests_wait_for_a_model_that_is_brought_back_and_its_state_tells(start: Any) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train(b"a"))
    async with start(held=True) as frontend:
        waiting = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"b")))
        read = asyncio.ensure_future(frontend.stub.GetStateDict(pb.GetStateDictRequest(name="models/m")))
        await frontend.until(lambda: frontend.cluster.starting)
        assert (await frontend.model()).state == model_pb2.MODEL_STATE_RECOVERING
        assert (await frontend.stub.ListModels(pb.ListModelsRequest())).models[0].state == (
            model_pb2.MODEL_STATE_RECOVERING
        )
        late = await frontend.error(frontend.stub.TrainStep(frontend.train(b"c"), timeout=0.1))
        assert late.reason == "DEADLINE_EXCEEDED" and not waiting.done() and not read.done()
        frontend.cluster.gate.set()
        assert (await waiting).result.step == 2 and (await read).step in (1, 2)
        assert steps(await ready(frontend)) == [(b"a", 1), (b"b", 2)]


async def test_who_does_not_wait_hears_at_once_that_a_command_is_not_known_yet(start: Any, fakes: Any) -> None:
    async with start(checkpoint_commands=1) as frontend:
        await frontend.create()
        requests = [frontend.train(value, request_id=fakes.request_id()) for value in (b"a", b"b")]
        await frontend.stub.TrainStep(requests[0])
        async with asyncio.timeout(5):
            while len((await frontend.stub.ListCheckpoints(pb.ListCheckpointsRequest())).checkpoints) < 2:
                await asyncio.sleep(0.01)
        # Nobody took one behind it.
        frontend.cluster.groups["m"].retained.kept.append("a forward")
        await frontend.stub.TrainStep(requests[1])
    in_checkpoint, in_journal = (pb.GetCommandRequest(name=get_command(each.request_id).name) for each in requests)
    async with start(held=True) as frontend:
        await frontend.until(lambda: frontend.cluster.starting)
        error = await frontend.error(frontend.stub.GetCommand(in_journal, timeout=2))
        assert (error.reason, error.retryable) == ("MODEL_RECOVERING", True) and error.retry_after
        found = await frontend.stub.GetCommand(in_checkpoint, timeout=2)
        assert found.state == model_pb2.COMMAND_STATE_APPLIED
        frontend.cluster.gate.set()
        assert steps(await ready(frontend))[-1] == (b"b", 2)
        assert (await frontend.stub.GetCommand(in_journal)).state == model_pb2.COMMAND_STATE_APPLIED
        assert (await frontend.stub.TrainStep(requests[1])).result.step == 2


async def test_newcomer_takes_no_ranks_before_the_models_of_the_storage_have_theirs(start: Any, fakes: Any) -> None:
    async with start() as frontend:
        await frontend.create("m")
        await frontend.create("other")
        created = frontend.creation("third", request_id=fakes.request_id())
        await frontend.stub.CreateModel(created)
        await save(frontend, "best")
    async with start(held=True) as frontend:
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation("new")))
        assert (error.reason, error.retryable, error.outcome) == ("MODEL_RECOVERING", True, "not_applied")
        assert error.retry_after
        restore = pb.RestoreModelRequest(checkpoint="checkpoints/best", model_id="again")
        assert (await frontend.error(frontend.stub.RestoreModel(restore))).reason == "MODEL_RECOVERING"
        # Who repeats a request takes nothing.
        await frontend.stub.CreateModel(created)
        await frontend.until(lambda: frontend.cluster.starting == 3)
        frontend.cluster.error = InvalidArgument("the third time it has failed")
        frontend.cluster.gate.set()
        async with asyncio.timeout(10):
            while {each.state for each in (await frontend.stub.ListModels(pb.ListModelsRequest())).models} != {FAILED}:
                await asyncio.sleep(0.01)
        assert frontend.cluster.tries == 9
        frontend.cluster.error = None
        await frontend.create("new")


async def test_model_that_finds_too_few_ranks_holds_up_no_newcomer(start: Any) -> None:
    async with start() as frontend:
        await frontend.create("m")
    async with start(held=True) as frontend:
        frontend.cluster.error = ResourceExhausted("no free ranks", reason="WORKERS_EXHAUSTED")
        frontend.cluster.gate.set()
        await frontend.until(lambda: frontend.cluster.tries > 1)
        error = await frontend.error(frontend.stub.CreateModel(frontend.creation("new")))
        assert error.reason == "WORKERS_EXHAUSTED"


async def test_so_many_requests_wait_for_a_model_as_would_in_its_queue(start: Any) -> None:
    async with start() as frontend:
        await frontend.create()
    async with start(held=True, requests_per_model=2) as frontend:
        waiting = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train())) for _ in range(2)]
        await asyncio.sleep(0.1)
        error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
        assert error.reason == "QUEUE_FULL" and error.retry_after
        frontend.cluster.gate.set()
        assert sorted(reply.result.step for reply in await asyncio.gather(*waiting)) == [1, 2]


async def test_deleted_model_does_not_come_back_and_its_files_are_gone(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.stub.TrainStep(frontend.train())
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
        assert not list((storage / "models").iterdir()) and not list(storage.glob("checkpoints/auto/*/*"))
        await frontend.create()
    async with start() as frontend:
        assert steps(await ready(frontend)) == []


async def test_creation_or_deletion_that_was_cut_off_leaves_nothing(start: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
    # Its first checkpoint was written, and no more; and its folder was renamed, and no more.
    os.rename(storage / "models/m", storage / "models/.deleted-x")
    async with start() as frontend:
        assert not (await frontend.stub.ListModels(pb.ListModelsRequest())).models
        await frontend.until(lambda: not list(storage.glob("checkpoints/auto/*/*/*")))
        assert not list((storage / "models").iterdir())


async def test_corrupt_model_is_listed_as_failed_and_others_are_served(start: Any, fakes: Any, storage: Path) -> None:
    async with start() as frontend:
        await frontend.create()
        await frontend.create("other")
        for model_id in ("m", "other"):
            await frontend.stub.TrainStep(frontend.train(model_id=model_id))
            await frontend.stub.TrainStep(frontend.train(model_id=model_id))
    (journal,) = (path for path in (storage / "models/m/journal").iterdir() if path.stat().st_size > 100)
    damaged = bytearray(journal.read_bytes())
    damaged[100] ^= 1
    journal.write_bytes(damaged)
    async with start() as frontend:
        assert len(steps(await ready(frontend, "other"))) == 2
        error = await frontend.error(frontend.stub.TrainStep(frontend.train()))
        assert error.reason == "MODEL_FAILED" and str(journal) in error.message
        # Whether the journal has the command is not known, so it is not declared not to have been applied.
        error = await frontend.error(frontend.stub.GetCommand(get_command(fakes.request_id())))
        assert error.reason == "MODEL_FAILED"
        assert (await frontend.error(save(frontend, "best"))).reason == "MODEL_FAILED"
        model = await frontend.model()
        assert model.state == model_pb2.MODEL_STATE_FAILED and str(journal) in model.last_error.message
        await frontend.stub.DeleteModel(pb.DeleteModelRequest(name="models/m"))
