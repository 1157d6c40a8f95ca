"""When a model is saved, and what goes afterwards, with a model and a store that remember what they were asked."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto.errors import (
    AlreadyExists,
    CheckpointNotFound,
    GradwireError,
    InvalidArgument,
    ResourceExhausted,
)
from gradwire_proto.values import Checkpoint, ModelState, Segment, TensorData
from gradwire_server.checkpoint_policy import CheckpointPolicy
from gradwire_server.checkpointer import Checkpointer
from gradwire_server.storage.saved_model import SavedModel

REQUEST = "00000000-0000-4000-8000-000000000001"
OTHER_REQUEST = "00000000-0000-4000-8000-000000000002"


class Journal:
    """A hundred bytes a command."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cuts: list[int] = []

    def size_after(self, number: int) -> int:
        return 100 * (self._model.number - max(number, 0))

    def cut(self, number: int) -> None:
        self.cuts.append(number)


class Model:
    """A model whose state is its number. `turn`: held, nothing gets its turn."""

    model_id = "digits"

    def __init__(self, folder: Path) -> None:
        self.number = 0
        self.retains = False
        self.journal: Journal | None = Journal(self)
        self.folder = folder
        self.turn = asyncio.Event()
        self.turn.set()
        self.captures: list[bool] = []

    def capture(self, *, automatic: bool) -> Awaitable[SavedModel | None]:
        number = self.number  # The turn is that of the call.
        self.captures.append(automatic)

        async def work() -> SavedModel | None:
            await self.turn.wait()
            if automatic and self.retains:
                return None
            path = self.folder / f"segment-{len(self.captures)}"
            path.write_bytes(bytes(4))
            tensors = {"w": TensorData("float32", (1,), Segment(str(path), 0, 4))}
            return saved(number, tensors)

        return work()


def saved(number: int, tensors: dict[str, TensorData]) -> SavedModel:
    state = ModelState(
        tensors=tensors,
        optimizer=None,
        step=number,
        command=number,
        trained=("w",),
        held=(None,),
        splits={},
        opened=(),
        threads=1,
    )
    return SavedModel(
        name="",
        model_id="digits",
        automatic=True,
        created_at=0.0,
        request_id=None,
        spec=b"",
        layout=(),
        workers=1,
        state=state,
    )


class Store:
    """Checkpoints by key. `gate` cleared holds writers; `error` is what they raise."""

    def __init__(self) -> None:
        self.held: dict[str, SavedModel] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.delete_error: Exception | None = None
        self.log: list[str] = []
        self.writers = self.most_writers = 0

    def write(self, key: str, saved: SavedModel) -> Checkpoint:
        self.writers += 1
        self.most_writers = max(self.most_writers, self.writers)
        try:
            assert self.gate.wait(10)
            if self.error is not None:
                raise self.error
            first = self.held.get(key)
            if first is not None and not saved.automatic:
                if first.request_id is None or first.request_id != saved.request_id:
                    raise AlreadyExists("taken", reason="CHECKPOINT_EXISTS")
                return first.checkpoint(4)
            assert all(Path(tensor.data.path).exists() for tensor in saved.state.tensors.values())  # pyright: ignore
            self.held[key] = saved
            self.log.append(f"write {key}")
            return saved.checkpoint(4)
        finally:
            self.writers -= 1

    def delete(self, key: str) -> None:
        if self.delete_error is not None:
            raise self.delete_error
        if key not in self.held:
            raise CheckpointNotFound("gone")
        del self.held[key]
        self.log.append(f"delete {key}")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A checkpointer and what it works on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = Model(folder)
        self.store = Store()
        self.clock = Clock()

    def checkpointer(self, kept: tuple[int, ...] = (0,), **policy: Any) -> Checkpointer:
        limits = {"commands": 10**6, "journal_bytes": 10**9, "seconds": 10**6, "keep": 2} | policy
        for number in kept:
            self.store.held[f"auto/digits/{number}"] = saved(number, {})
        return Checkpointer(self.model, self.store, CheckpointPolicy(**limits), kept, clock=self.clock)

    async def run(self, checkpointer: Checkpointer, commands: int) -> None:
        for _ in range(commands):
            self.model.number += 1
            checkpointer.applied()
            await asyncio.sleep(0)

    @property
    def keys(self) -> list[str]:
        return sorted(self.store.held)


@pytest.fixture
async def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to be")


async def settled() -> None:
    """Time enough for what must not happen."""
    await asyncio.sleep(0.1)


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


# --- on request ---------------------------------------------------------------------------------------------------


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
