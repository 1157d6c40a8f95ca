"""Fits on datasets, as any client would ask for them."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest
from server.brought_back import ready
from server.fit_requests import EXAMPLES, creation, fit, losses, told

from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_server import fit as fit_module
from gradwire_server.storage.segment_writer import SegmentWriter


async def test_fit_applies_every_step_once_numbered_like_commands_of_their_own(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    await frontend.stub.CreateDataset(creation())
    messages, error = await told(frontend, fit(fakes.request_id()))
    assert error is None
    assert losses(messages) == [float(step) for step in range(9)]
    assert [message.first_step for message in messages] == [0, 1, 2, 7, 9]
    assert messages[-1].done and not messages[-2].done
    assert [(number, step) for number, step, _ in workers.fitting.applied] == [(2 + step, step) for step in range(9)]
    await frontend.stub.TrainStep(frontend.train(b"b"))
    assert workers.calls[-1][2] == 11
    assert (await frontend.model()).step == 11
    assert ("forget",) in workers.calls


async def test_first_smaller_batch_begins_a_command_since_it_may_bring_a_variant(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    await told(frontend, fit(fakes.request_id(), epochs=5))
    found = [call[1:] for call in workers.calls if call[0] == "fit"]
    assert found == [(0, 1), (1, 1), (2, 5), (7, 5), (12, 3)]


async def test_shuffled_fit_takes_each_epochs_rows_in_the_order_of_its_seed(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    await told(frontend, fit(fakes.request_id(), shuffle=True, seed=7))
    rows = [row for _, _, taken in workers.fitting.applied for row in taken]
    assert rows == [(row + 7 + epoch) % 10 for epoch in range(3) for row in range(10)]
    assert [len(taken) for _, _, taken in workers.fitting.applied] == [4, 4, 2] * 3


async def test_validation_comes_after_each_epoch_and_before_the_next(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    await frontend.stub.CreateDataset(creation())
    messages, _ = await told(frontend, fit(fakes.request_id(), validation_dataset="datasets/d"))
    found = [
        (each.first_step, each.epoch, each.validation_loss) for each in messages if each.HasField("validation_loss")
    ]
    assert found == [(3, 0, 103.0), (6, 1, 106.0), (9, 2, 109.0)]


async def test_other_requests_get_their_turn_between_the_steps_of_a_fit(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    stream = frontend.stub.Fit(fit(fakes.request_id(), epochs=100_000))
    await stream.read()
    await frontend.stub.TrainStep(frontend.train(b"a"))
    assert "train_step" in [call[0] for call in workers.calls]
    stream.cancel()
    await frontend.until(lambda: not frontend.tenant.admission.in_flight)
    count = len(workers.fitting.applied)
    await asyncio.sleep(0.05)
    assert len(workers.fitting.applied) == count < 300_000


async def test_fit_that_was_cut_off_goes_on_where_it_was_with_its_request_id(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    request = fit(fakes.request_id(), epochs=20)
    stream = frontend.stub.Fit(request)
    first = [await stream.read(), await stream.read()]
    workers.gate.clear()
    await frontend.until(lambda: workers.busy)
    stream.cancel()
    await frontend.until(lambda: not frontend.tenant.admission.in_flight)
    workers.gate.set()
    request.completed_steps = len(losses(first))
    rest, error = await told(frontend, request)
    assert error is None
    assert losses([*first, *rest]) == [float(step) for step in range(60)]
    assert [step for _, step, _ in workers.fitting.applied] == list(range(60))


async def test_step_whose_loss_is_stored_no_more_is_not_applied_once_more(
    start: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "_KEPT", 2)
    async with start() as frontend:
        workers = await frontend.create()
        await frontend.stub.CreateDataset(creation())
        request = fit(fakes.request_id(), epochs=20)
        messages, _ = await told(frontend, request)
        request.completed_steps = 7
        again, error = await told(frontend, request)
        assert error is not None and (again, error.reason, error.outcome) == ([], "REPLY_FORGOTTEN", "applied")
        assert len(workers.fitting.applied) == 60
        request.completed_steps = messages[-3].first_step
        assert losses((await told(frontend, request))[0]) == [
            float(step) for step in range(request.completed_steps, 60)
        ]
    async with start() as frontend:
        workers = await ready(frontend)
        request.completed_steps = 3
        assert (await told(frontend, request))[1].reason == "REPLY_FORGOTTEN"
        assert len(workers.fitting.applied) == 60


async def test_dataset_that_is_deleted_meanwhile_is_there_for_the_fit_that_uses_it(
    frontend: Any, fakes: Any, storage: Any
) -> None:
    workers = await frontend.create(durability="none")
    await frontend.stub.CreateDataset(creation())
    stream = frontend.stub.Fit(fit(fakes.request_id(), epochs=20))
    messages = aiter(stream)
    await anext(messages)
    await frontend.stub.DeleteDataset(pb.DeleteDatasetRequest(name="datasets/d"))
    rest = [message async for message in messages]
    assert rest[-1].done and set(workers.fitting.examples) == {EXAMPLES}
    await frontend.until(lambda: not list((storage / "datasets").iterdir()))


async def test_stop_tells_what_was_under_way_and_begins_no_more(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    request = fit(fakes.request_id(), epochs=20)
    stream = frontend.stub.Fit(request)
    heard = losses([await stream.read()])
    workers.gate.clear()
    await frontend.until(lambda: workers.busy)
    request.completed_steps, request.stop = len(heard), True
    stopping = asyncio.ensure_future(told(frontend, request))
    await asyncio.sleep(0.02)
    workers.gate.set()
    messages, error = await stopping
    assert error is None and not messages[-1].done
    count = len(workers.fitting.applied)
    assert [*heard, *losses(messages)] == [float(step) for step in range(count)]
    assert count < 60
    # Nor may a repeat leave some out.
    request.completed_steps, request.stop = count + 1, False
    _, error = await told(frontend, request)
    assert error is not None and error.field == "completed_steps"


async def test_call_of_a_fit_that_comes_while_another_still_runs_hears_every_step_too(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradwire_server.fit_pace.SECONDS", 1.0)
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation(bytes(800), rows=100))
    run, may_end = workers.fitting.run, asyncio.Event()
    begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def held(dataset: Any, steps: Any, **how: Any) -> Any:
        # The last command of the first epoch: what follows is begun by whoever is first.
        if steps.first_step + steps.steps == 100:
            begun.set_result(steps.first_step)
            await may_end.wait()
        return await run(dataset, steps, **how)

    workers.fitting.run = held
    request = fit(fakes.request_id(), batch_size=1, validation_dataset="datasets/d")
    old = asyncio.ensure_future(told(frontend, request))
    request.completed_steps = first = await asyncio.wait_for(begun, 5)
    new = asyncio.ensure_future(told(frontend, request))
    await asyncio.sleep(0.05)
    may_end.set()
    heard, again = await asyncio.gather(old, new)
    assert (heard[1], again[1]) == (None, None)
    assert losses(heard[0]) == [float(step) for step in range(300)] and losses(again[0]) == losses(heard[0])[first:]
    assert [step for _, step, _ in workers.fitting.applied] == list(range(300))


async def test_refused_step_ends_the_fit_with_epoch_and_batch_and_those_before_stay(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    workers.fitting.refused_at = 4
    request = fit(fakes.request_id())
    messages, error = await told(frontend, request)
    assert losses(messages) == [0.0, 1.0, 2.0, 3.0]
    assert error is not None
    assert (error.reason, error.field, error.outcome) == ("LOSS_NOT_FINITE", "dataset", "applied")
    assert error.message.startswith("epoch 1, batch 1 (step 4 of the fit): the loss is nan")
    assert (await frontend.model()).step == 4
    # The same for a repeat, which applies nothing.
    again, error = await told(frontend, request)
    assert (losses(again), error.reason) == ([0.0, 1.0, 2.0, 3.0], "LOSS_NOT_FINITE")
    assert len(workers.fitting.applied) == 4


async def test_what_was_begun_ahead_of_a_refused_step_is_not_applied(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    workers.fitting.refused_at = 40
    messages, error = await told(frontend, fit(fakes.request_id(), epochs=20))
    assert error is not None and error.message.startswith("epoch 13, batch 1 (step 40")
    assert losses(messages) == [float(step) for step in range(40)]
    assert [step for _, step, _ in workers.fitting.applied] == list(range(40))
    await frontend.stub.TrainStep(frontend.train(b"a"))
    assert workers.calls[-1][2] == 41


@pytest.mark.parametrize("step", [1, 20])
async def test_command_of_a_fit_that_is_undone_comes_again_before_those_behind_it(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    workers, write = await frontend.create(), SegmentWriter.write
    await frontend.stub.CreateDataset(creation())
    lost = RankLost("rank 0 died", outcome="unknown")

    async def dead() -> Any:
        raise lost

    def fails(self: SegmentWriter, parts: Any) -> int:
        if len(workers.fitting.applied) < step or workers.error is not None:
            return write(self, parts)
        workers.error, workers.state = lost, dead
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(SegmentWriter, "write", fails)
    request = fit(fakes.request_id(), epochs=20)
    messages, error = await told(frontend, request)
    assert error is not None and (error.outcome, error.retryable) == ("not_applied", True)
    request.completed_steps = len(losses(messages))
    assert request.completed_steps < len(workers.fitting.applied)
    rest, error = await told(frontend, request)
    assert error is None
    assert losses([*messages, *rest]) == [float(step) for step in range(60)]
    assert [step for _, step, _ in frontend.cluster.groups["m"].fitting.applied] == list(range(60))


async def test_command_of_a_fit_that_turns_out_to_be_undone_is_begun_anew_by_the_call_that_found_it(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("gradwire_server.model_records.PAUSE", 0.0)
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    request = fit(fakes.request_id())
    with monkeypatch.context() as patch:
        patch.setattr("gradwire_server.storage.local_folders.os.rename", broken)
        patch.setattr(SegmentWriter, "write", broken)
        patch.setattr(SegmentWriter, "cut", broken)
        messages, error = await told(frontend, request)
        assert error is not None and (messages, error.outcome) == ([], "unknown")
        workers.on_lost(RankLost("rank 0 died"))
        await frontend.until(lambda: frontend.cluster.groups["m"] is not workers)
        workers = await ready(frontend)
    rest, error = await told(frontend, request)
    assert (losses(rest), error) == ([float(step) for step in range(9)], None)
    assert [step for _, step, _ in workers.fitting.applied] == list(range(9))


async def test_request_id_of_a_fit_is_good_for_that_fit_alone(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    await frontend.stub.CreateDataset(creation())
    request = fit(fakes.request_id())
    await told(frontend, request)
    request.batch_size = 5
    _, error = await told(frontend, request)
    assert error is not None and error.reason == "REQUEST_ID_REUSED"
    _, error = await told(frontend, fit(""))
    assert error is not None and (error.reason, error.field) == ("FIELD_MISSING", "request_id")


@pytest.mark.parametrize(
    ("how", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"shuffle": True, "seed": 2**63 - 1}, "seed"),
        ({"completed_steps": 10}, "completed_steps"),
        ({"dataset": "datasets/none"}, "dataset"),
        ({"validation_dataset": "datasets/none"}, "validation_dataset"),
    ],
)
async def test_fit_is_refused_by_the_field_that_is_wrong(frontend: Any, fakes: Any, how: Any, field: str) -> None:
    await frontend.create()
    await frontend.stub.CreateDataset(creation())
    _, error = await told(frontend, fit(fakes.request_id(), **how))
    assert error is not None and error.field == field


async def test_no_more_rows_are_shuffled_than_an_order_has_room_for(
    frontend: Any, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = await frontend.create()
    await frontend.stub.CreateDataset(creation())
    monkeypatch.setattr("gradwire_server.fit.MOST_SHUFFLED", 9)
    _, error = await told(frontend, fit(fakes.request_id(), shuffle=True))
    assert error is not None and error.field == "shuffle" and "at most 9 rows to shuffle, got 10" in str(error)
    assert not workers.calls
    _, error = await told(frontend, fit(fakes.request_id()))
    assert error is None
