"""Futures: results for threads and coroutines, in the order of the calls."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import os
import threading
import time
import weakref

import pytest

from gradwire import errors
from gradwire.futures import CallQueue


class NoSteps:
    """No training steps are submitted here: test_step_futures.py."""

    has_room = True

    def __len__(self) -> int:
        return 0

    def add(self, future, step) -> None: ...

    def advance(self) -> None: ...

    def drain(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def queue():
    queue = CallQueue("test", NoSteps())
    yield queue
    queue.cancel()


def test_calls_run_one_by_one_in_the_order_in_which_they_were_made(queue):
    running, order = threading.Semaphore(1), []

    def call(number: int):
        assert running.acquire(blocking=False)
        time.sleep(0.001 * (number % 3))
        order.append(number)
        running.release()
        return number

    futures = [queue.submit(lambda number=number: call(number)) for number in range(20)]
    assert [future.result(5) for future in futures] == order == list(range(20))


def test_error_of_a_call_is_raised_by_result_and_the_next_call_runs(queue):
    failed = queue.submit(lambda: 1 / 0)
    fine = queue.submit(lambda: "fine")
    with pytest.raises(ZeroDivisionError):
        failed.result(5)
    assert fine.result(5) == "fine"


def test_result_that_nobody_holds_is_freed_while_the_next_call_runs(queue):
    class Large:
        pass

    first, go, began = queue.submit(Large), threading.Event(), threading.Event()
    result = weakref.ref(first.result(5))
    second = queue.submit(lambda: began.set() or go.wait(5))
    assert began.wait(5)
    del first
    gc.collect()
    assert result() is None
    go.set()
    assert second.result(5) is True


def test_result_stops_waiting_after_its_timeout_and_the_call_goes_on(queue):
    go = threading.Event()
    future = queue.submit(lambda: go.wait(5))
    with pytest.raises(TimeoutError):
        future.result(0.05)
    assert not future.done()
    go.set()
    assert future.result(5) is True


def test_future_can_be_awaited_from_any_running_loop(queue):
    async def waits():
        first, second = queue.submit(lambda: 1), queue.submit(lambda: 2)
        return await asyncio.gather(first, second)

    assert asyncio.run(waits()) == [1, 2]
    assert asyncio.run(waits()) == [1, 2]


def test_call_that_was_not_sent_can_be_cancelled_and_one_that_runs_cannot(queue):
    go, started = threading.Event(), threading.Event()
    running = queue.submit(lambda: started.set() or go.wait(5))
    waiting = queue.submit(lambda: "never")
    assert started.wait(5)
    assert waiting.cancel() and not running.cancel()
    go.set()
    assert running.result(5) is True
    with pytest.raises(concurrent.futures.CancelledError):
        waiting.result(5)


def test_closing_the_queue_raises_cancelled_from_what_waits(queue):
    go, started = threading.Event(), threading.Event()
    running = queue.submit(lambda: started.set() or go.wait(5))
    waiting = queue.submit(lambda: "never")
    assert started.wait(5)
    queue.cancel()
    with pytest.raises(errors.Cancelled) as caught:
        waiting.result(5)
    assert caught.value.outcome == "not_applied"
    go.set()
    assert running.result(5) is True


def test_wait_returns_after_everything_that_was_submitted(queue):
    done = []
    for number in range(3):
        queue.submit(lambda number=number: (time.sleep(0.02), done.append(number)))
    queue.wait()
    assert done == [0, 1, 2]


def test_idle_queue_ends_its_thread(queue, monkeypatch):
    monkeypatch.setattr("gradwire.futures._LINGER", 0.05)
    queue.submit(lambda: None).result(5)
    thread = next(thread for thread in threading.enumerate() if thread.name == "gradwire-test")
    thread.join(5)
    assert not thread.is_alive()
    assert queue.submit(lambda: "again").result(5) == "again"


def test_wait_in_a_done_callback_returns_at_once(queue):
    go, called = threading.Event(), threading.Event()
    future = queue.submit(lambda: go.wait(5))
    queue.submit(lambda: "waits behind it")
    future.add_done_callback(lambda _: (queue.wait(), called.set()))
    go.set()
    assert called.wait(2)
    queue.wait()


def answer_of_a_forked_child(function) -> str:
    """What `function()` gives, or raises, in a forked child; "hangs" where it does not end in two seconds."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = ["hangs"]

        def call() -> None:
            try:
                said[0] = str(function())
            except BaseException as error:
                said[0] = getattr(error, "reason", None) or repr(error)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(2)
        os.write(write, said[0].encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read) as answer:
        return answer.read()


def test_forked_child_is_told_so_whatever_the_parent_was_doing(queue):
    go = threading.Event()
    future = queue.submit(lambda: go.wait(10))
    assert answer_of_a_forked_child(queue.wait) == "CLIENT_FORKED"
    assert answer_of_a_forked_child(lambda: queue.submit(lambda: 1).result(1)) == "CLIENT_FORKED"
    with queue._changed:  # as another thread may hold it
        assert answer_of_a_forked_child(lambda: queue.submit(lambda: 1)) == "CLIENT_FORKED"
        assert answer_of_a_forked_child(queue.cancel) == "None"
    go.set()
    assert future.result(5) is True


def test_result_lives_as_long_as_the_caller_keeps_it_and_no_longer(queue):
    class Large:
        pass

    result = queue.submit(Large).result(5)
    watched = weakref.ref(result)
    del result
    assert queue.submit(lambda: watched() is None).result(5)
