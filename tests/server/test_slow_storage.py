"""Storage that takes its time: nobody else waits for it."""

from __future__ import annotations

import asyncio
import errno
import threading
from typing import Any

from server.brought_back import ready, steps

from gradwire_proto.errors import RankLost
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.segment_writer import SegmentWriter


async def test_large_command_is_written_without_holding_up_other_models(frontend: Any, monkeypatch: Any) -> None:
    workers, may_write, write = await frontend.create("m"), threading.Event(), SegmentWriter.write
    await frontend.create("other", durability="none")

    def slow(self: SegmentWriter, parts: Any) -> int:
        assert may_write.wait(5), "it is written on the event loop"
        return write(self, parts)

    monkeypatch.setattr(SegmentWriter, "write", slow)
    monkeypatch.setattr("gradwire_server.model_records.AHEAD_BYTES", 0)
    waiting = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"a")))]
    await frontend.until(lambda: steps(workers))
    waiting.append(asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(b"b"))))
    assert (await frontend.stub.TrainStep(frontend.train(b"c", model_id="other"))).result.step == 1
    await asyncio.sleep(0.1)
    assert not waiting[0].done() and len(steps(workers)) == 1, "the next command of this one waits"
    may_write.set()
    assert [reply.result.step for reply in await asyncio.gather(*waiting)] == [1, 2]


async def test_journal_that_is_mended_holds_up_no_other_model(frontend: Any, monkeypatch: Any) -> None:
    may_restart, restarting = threading.Event(), threading.Event()
    restart, write, failures = Journal.restart, SegmentWriter.write, [OSError(errno.EIO, "Input/output error")]

    def slowly(self: Journal, after: int) -> None:
        restarting.set()
        assert may_restart.wait(5), "the event loop waits for it"
        restart(self, after)

    def fails_once(self: Any, parts: Any) -> Any:
        if failures:
            raise failures.pop()
        return write(self, parts)

    workers = await frontend.create("m")
    await frontend.create("other", durability="none")
    monkeypatch.setattr(Journal, "restart", slowly)
    monkeypatch.setattr(SegmentWriter, "write", fails_once)
    waiting = [asyncio.ensure_future(frontend.stub.TrainStep(frontend.train(value))) for value in (b"a", b"b")]
    await frontend.until(restarting.is_set)
    assert (await frontend.stub.TrainStep(frontend.train(b"c", model_id="other"))).result.step == 1
    await asyncio.sleep(0.1)
    assert not any(call.done() for call in waiting) and len(steps(workers)) == 1, "the next command of this one waits"
    may_restart.set()
    assert [reply.result.step for reply in await asyncio.gather(*waiting)] == [1, 2]


async def test_journal_that_is_read_holds_up_no_other_model(start: Any, monkeypatch: Any) -> None:
    may_read, reading, read = threading.Event(), threading.Event(), journal_module.read_segments

    def slowly(segments: Any, after: int) -> Any:
        for number, placed in enumerate(read(segments, after)):
            if number == 20:
                reading.set()
                assert may_read.wait(5), "the event loop waits for it"
            yield placed

    async with start() as frontend:
        await frontend.create("m")
        for _ in range(30):
            await frontend.stub.TrainStep(frontend.train(b"a"))
    async with start() as frontend:
        workers = await ready(frontend)
        await frontend.create("other", durability="none")
        monkeypatch.setattr(journal_module, "read_segments", slowly)
        workers.on_lost(RankLost("rank 0 died"))
        await frontend.until(reading.is_set)
        assert (await frontend.stub.TrainStep(frontend.train(b"c", model_id="other"))).result.step == 1
        may_read.set()
        assert steps(await ready(frontend)) == [(b"a", number) for number in range(1, 31)]


async def test_store_that_does_not_answer_holds_up_nothing_else(frontend: Any, monkeypatch: Any) -> None:
    answers, asked, get = threading.Event(), [], CheckpointStore.get

    def hang(self: CheckpointStore, key: str) -> Any:
        asked.append(key)
        assert answers.wait(10)
        return get(self, key)

    await frontend.create("m")
    monkeypatch.setattr(CheckpointStore, "get", hang)
    request = pb.GetCheckpointRequest(name="models/m/checkpoints/0")
    waiting = [asyncio.ensure_future(frontend.stub.GetCheckpoint(request)) for _ in range(40)]
    try:
        # As many as there are threads, however many that are.
        await frontend.until(lambda: len(asked) > 5)
        await asyncio.sleep(0.2)
        async with asyncio.timeout(3):
            await frontend.create("other", durability="none")
    finally:
        answers.set()
    assert {found.name for found in await asyncio.gather(*waiting)} == {"models/m/checkpoints/0"}
