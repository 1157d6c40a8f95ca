"""Checkpoints that somebody asks for: named, repeated, refused, and waited for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from server.checkpointer_bench import OTHER_REQUEST, REQUEST, Bench, settled, until

from gradwire_proto.errors import (
    AlreadyExists,
    GradwireError,
    InvalidArgument,
    ResourceExhausted,
)
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.storage.saved_model import SavedModel


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def test_named_one_answers_with_the_checkpoint_and_is_never_dropped(bench):
    checkpointer = bench.checkpointer(commands=1, keep=1)
    bench.model.number = 7
    checkpoint = await checkpointer.save("best", REQUEST)
    assert (checkpoint.name, checkpoint.step, checkpoint.automatic) == ("best", 7, False)
    assert bench.store.held["named/best"].request_id == REQUEST
    for number in (8, 9, 10):
        await bench.run(checkpointer, 1)
        await until(lambda: checkpointer.newest == number)  # noqa: B023
    await until(lambda: bench.keys == ["auto/digits/10", "named/best"])


async def test_request_id_that_named_one_checkpoint_makes_no_other(bench):
    checkpointer = bench.checkpointer()
    first = await checkpointer.save("best", REQUEST)
    for name in ("other", None):
        with pytest.raises(InvalidArgument) as caught:
            await checkpointer.save(name, REQUEST)
        assert caught.value.reason == "REQUEST_ID_REUSED"
    assert await checkpointer.save("best", REQUEST) == first
    assert bench.keys == ["auto/digits/0", "named/best"]


async def test_named_one_holds_the_state_of_its_turn_though_another_is_being_written(bench):
    checkpointer = bench.checkpointer(commands=1)
    bench.store.gate.clear()
    await bench.run(checkpointer, 1)
    await until(lambda: bench.store.writers == 1)
    bench.model.number = 2
    saving = asyncio.ensure_future(checkpointer.save("best", None))
    await asyncio.sleep(0)
    bench.model.number = 50
    await settled()
    assert not saving.done() and bench.store.most_writers == 1
    bench.store.gate.set()
    assert (await saving).command == 2


async def test_turn_of_a_named_one_is_that_of_its_call(bench):
    checkpointer = bench.checkpointer()
    bench.model.number = 2
    saving = checkpointer.save("best", None)
    task = asyncio.ensure_future(saving)
    await asyncio.sleep(0)
    assert bench.model.captures == [False]
    assert (await task).command == 2


async def test_named_one_is_taken_while_forwards_are_retained(bench):
    bench.model.retains = True
    assert (await bench.checkpointer().save("best", None)).name == "best"


async def test_name_that_is_taken_is_refused_but_for_the_same_request(bench):
    checkpointer = bench.checkpointer()
    first = await checkpointer.save("best", REQUEST)
    bench.model.number = 9
    assert await checkpointer.save("best", REQUEST) == first
    for request_id in (None, OTHER_REQUEST):
        with pytest.raises(AlreadyExists):
            await checkpointer.save("best", request_id)


async def test_one_without_a_name_gets_one_that_a_repeat_finds_again(bench):
    checkpointer = bench.checkpointer()
    first = await checkpointer.save(None, REQUEST)
    bench.model.number = 9
    assert await checkpointer.save(None, REQUEST) == first
    others = {(await checkpointer.save(None, each)).name for each in (None, None, OTHER_REQUEST)}
    assert len(others | {first.name}) == 4 and all(name.startswith("digits-") for name in others)


@pytest.mark.parametrize("name", ["", "Best", "a/b", "..", "x" * 64])
async def test_name_of_another_form_is_refused_before_anything_is_done(bench, name):
    with pytest.raises(InvalidArgument):
        await bench.checkpointer().save(name, None)
    assert bench.model.captures == []


async def test_caller_who_leaves_does_not_cut_a_checkpoint_off(bench):
    checkpointer = bench.checkpointer()
    bench.store.gate.clear()
    saving = asyncio.ensure_future(checkpointer.save("best", None))
    await until(lambda: bench.store.writers == 1)
    saving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await saving
    bench.store.gate.set()
    await until(lambda: "named/best" in bench.keys)
    await until(lambda: not list(bench.folder.iterdir()))


async def test_closing_waits_for_what_is_being_written_and_takes_no_more(bench):
    checkpointer = bench.checkpointer(commands=1)
    bench.store.gate.clear()
    await bench.run(checkpointer, 1)
    saving = asyncio.ensure_future(checkpointer.save("best", None))
    await until(lambda: bench.store.writers == 1)
    closing = asyncio.ensure_future(checkpointer.close())
    await settled()
    assert not closing.done()
    bench.store.gate.set()
    await closing
    assert (await saving).name == "best" and bench.keys == ["auto/digits/0", "auto/digits/1", "named/best"]
    await bench.run(checkpointer, 5)
    await settled()
    assert len(bench.model.captures) == 2


async def test_writers_that_wait_hold_nobody_elses_threads(bench):
    with ThreadPoolExecutor(2, "checkpoints") as threads:
        policy = CheckpointPolicy(commands=1, journal_bytes=1, seconds=1, keep=1)
        checkpointer = Checkpointer(bench.model, bench.store, policy, threads=threads)
        names = []
        write, delete = bench.store.write, bench.store.delete

        def recorded(call: Any) -> Any:
            def run(*arguments: Any) -> Any:
                names.append(threading.current_thread().name)
                return call(*arguments)

            return run

        bench.store.write, bench.store.delete = recorded(write), recorded(delete)
        await checkpointer.save("best", None)
        for number in (1, 2):
            bench.model.number = number
            checkpointer.applied()
            await until(lambda number=number: checkpointer.newest == number)
        await until(lambda: len(names) == 4)
        assert all(name.startswith("checkpoints") for name in names)


async def test_refusal_of_the_capture_is_the_callers(bench):
    def refuse(*, automatic: bool) -> Awaitable[SavedModel | None]:
        async def work() -> SavedModel | None:
            raise ResourceExhausted("shared memory is full", reason="MEMORY_FOLDER_FULL")

        return work()

    checkpointer = bench.checkpointer()
    bench.model.capture = refuse
    with pytest.raises(GradwireError, match="shared memory"):
        await checkpointer.save("best", None)
    assert bench.keys == ["auto/digits/0"]
