"""When a model is saved by itself, what goes afterwards, and what becomes of failures."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from server.checkpointer_bench import Bench, Model, Store, settled, until

from gradwire_proto.errors import (
    ResourceExhausted,
)
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpointer import Checkpointer


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# --- when ---------------------------------------------------------------------------------------------------------


async def test_checkpoint_is_taken_after_so_many_commands(bench):
    checkpointer = bench.checkpointer(commands=5)
    await bench.run(checkpointer, 4)
    await settled()
    assert bench.keys == ["auto/digits/0"]
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.newest == 5)
    assert bench.store.held["auto/digits/5"].name == "digits/5"
    assert bench.store.held["auto/digits/5"].automatic and bench.store.held["auto/digits/5"].created_at > 1e9


async def test_checkpoint_is_taken_after_so_many_bytes_of_journal(bench):
    checkpointer = bench.checkpointer(journal_bytes=300)
    await bench.run(checkpointer, 2)
    await settled()
    assert checkpointer.newest == 0
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.newest == 3)


async def test_checkpoint_is_taken_after_so_many_seconds(bench):
    checkpointer = bench.checkpointer(seconds=60)
    await bench.run(checkpointer, 1)
    bench.clock.now += 59
    await bench.run(checkpointer, 1)
    await settled()
    assert checkpointer.newest == 0
    bench.clock.now += 1
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.newest == 3)


async def test_seconds_pass_without_further_commands(tmp_path):
    model, store = Model(tmp_path), Store()
    policy = CheckpointPolicy(commands=10, journal_bytes=10**6, seconds=0.2, keep=1)
    checkpointer = Checkpointer(model, store, policy, (0,))
    model.number += 1
    checkpointer.applied()
    await until(lambda: checkpointer.newest == 1)
    await asyncio.sleep(0.5)
    assert model.captures == [True]  # Nothing changed since.


async def test_commands_go_on_while_one_is_written_and_the_next_follows(bench):
    checkpointer = bench.checkpointer(commands=5)
    bench.store.gate.clear()
    await bench.run(checkpointer, 5)
    await until(lambda: bench.store.writers == 1)
    await bench.run(checkpointer, 20)
    await settled()
    assert bench.model.captures == [True]
    bench.store.gate.set()
    await until(lambda: checkpointer.newest == 25)
    assert bench.model.captures == [True, True] and bench.store.most_writers == 1


async def test_none_is_taken_while_forwards_are_retained(bench, monkeypatch):
    monkeypatch.setattr("gradwire_server.checkpointer._RETAINED_WAIT", 0.1)
    checkpointer = bench.checkpointer(commands=1)
    bench.model.retains = True
    await bench.run(checkpointer, 3)
    await settled()
    assert checkpointer.newest == 0 and checkpointer.last_error is None
    bench.model.retains = False
    bench.clock.now += 1
    await until(lambda: checkpointer.newest == 3)  # By itself: letting go of a forward is no command.


async def test_model_without_a_policy_is_never_saved_by_itself(bench):
    checkpointer = Checkpointer(bench.model, bench.store, None)
    await bench.run(checkpointer, 50)
    await settled()
    assert bench.keys == []
    assert (await checkpointer.save("best", None)).step == 50


@pytest.mark.parametrize("field", ["commands", "journal_bytes", "seconds", "keep"])
def test_policy_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match=field):
        CheckpointPolicy(**{"commands": 1, "journal_bytes": 1, "seconds": 1, "keep": 1} | {field: 0})


# --- what goes ----------------------------------------------------------------------------------------------------


async def test_newest_ones_are_kept_and_the_journal_is_cut_behind_the_last_but_one(bench):
    checkpointer = bench.checkpointer(commands=1, keep=3)
    for number in range(1, 6):
        await bench.run(checkpointer, 1)
        await until(lambda: checkpointer.newest == number)  # noqa: B023
        await until(lambda: len(bench.model.journal.cuts) == number)  # noqa: B023
    assert bench.keys == ["auto/digits/3", "auto/digits/4", "auto/digits/5"]
    assert bench.model.journal.cuts == [0, 1, 2, 3, 4]


async def test_one_that_is_kept_alone_goes_after_the_next_is_there(bench):
    checkpointer = bench.checkpointer(commands=1, keep=1)
    await bench.run(checkpointer, 1)
    await until(lambda: bench.model.journal.cuts)
    await until(lambda: bench.store.log == ["write auto/digits/1", "delete auto/digits/0"])
    assert bench.model.journal.cuts == [1]


async def test_failed_checkpoint_takes_nothing_away(bench):
    checkpointer = bench.checkpointer(commands=1, keep=1)
    bench.store.error = ResourceExhausted("full", reason="STORAGE_FULL")
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.last_error)
    assert bench.keys == ["auto/digits/0"] and bench.model.journal.cuts == []


async def test_old_one_that_cannot_be_deleted_goes_another_time(bench, caplog):
    checkpointer = bench.checkpointer(commands=1, keep=1)
    bench.store.delete_error = ResourceExhausted("no", reason="STORAGE_UNREACHABLE")
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.last_error)
    assert checkpointer.newest == 1 and "could not be removed" in caplog.text
    assert bench.model.journal.cuts == [1], "the journal does not grow meanwhile"
    bench.store.delete_error = None
    await bench.run(checkpointer, 1)
    await until(lambda: bench.keys == ["auto/digits/2"])
    await until(lambda: checkpointer.last_error is None)


async def test_old_one_that_somebody_deleted_is_no_failure(bench):
    checkpointer = bench.checkpointer(commands=1, keep=1)
    bench.store.held.clear()
    await bench.run(checkpointer, 1)
    await until(lambda: bench.model.journal.cuts == [1])
    assert checkpointer.last_error is None


async def test_files_of_the_state_are_removed_whatever_happens(bench):
    checkpointer = bench.checkpointer(commands=1)
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.newest == 1)
    bench.store.error = ResourceExhausted("full", reason="STORAGE_FULL")
    with pytest.raises(ResourceExhausted):
        await checkpointer.save("best", None)
    await bench.run(checkpointer, 1)
    await until(lambda: checkpointer.last_error)
    await until(lambda: not list(bench.folder.iterdir()))


# --- failures -----------------------------------------------------------------------------------------------------


async def test_failure_is_logged_told_and_tried_again_ever_more_seldom(bench, caplog):
    checkpointer = bench.checkpointer(commands=1)
    bench.store.error = ResourceExhausted("the disk is full", reason="STORAGE_FULL")
    waits = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    await bench.run(checkpointer, 1)
    await until(lambda: "tried again in 1 s" in caplog.text)
    for attempt, wait in enumerate(waits, start=1):
        bench.clock.now += wait - 0.01
        checkpointer.applied()
        await asyncio.sleep(0.02)
        assert len(bench.model.captures) == attempt
        bench.clock.now += 0.0101
        checkpointer.applied()
        await until(lambda: caplog.text.count("tried again in") == attempt + 1)  # noqa: B023
        assert len(bench.model.captures) == attempt + 1
    assert checkpointer.last_error == "the disk is full"
    assert "model digits: no checkpoint could be taken, tried again in 60 s: the disk is full" in caplog.text


async def test_model_goes_on_and_is_saved_when_there_is_room_again(bench):
    checkpointer = bench.checkpointer(commands=5)
    bench.store.error = ResourceExhausted("the disk is full", reason="STORAGE_FULL")
    await bench.run(checkpointer, 30)
    await until(lambda: checkpointer.last_error)
    await bench.run(checkpointer, 30)
    assert len(bench.model.captures) == 1
    bench.store.error = None
    bench.clock.now += 1
    await until(lambda: checkpointer.newest == 60)  # By its own timer: no command comes.
    assert checkpointer.last_error is None


async def test_defect_is_logged_with_where_it_was(bench, caplog):
    checkpointer = bench.checkpointer(commands=1)
    bench.store.error = ZeroDivisionError("a defect")
    await bench.run(checkpointer, 1)
    await until(lambda: "Traceback" in caplog.text)
    assert caplog.records[-1].levelno == logging.ERROR
