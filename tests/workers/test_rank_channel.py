"""The hot path's seam: a channel here, a rank's serving thread in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from gradwire_proto.errors import InternalError, InvalidArgument, RankLost
from gradwire_proto.values import TensorData
from gradwire_workers.rank_channel import RankChannel


def start_rank(folder: Path, patience: float = 30.0) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("echo_rank.py")
    process = subprocess.Popen(
        [sys.executable, script, f"ipc://{folder}/rank.sock", str(patience)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "serving\n"
    return process


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = start_rank(tmp_path)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
async def channel(rank, tmp_path: Path) -> AsyncIterator[RankChannel]:
    context = zmq.Context()
    channel = RankChannel(context, f"ipc://{tmp_path}/rank.sock", "rank-x")
    await channel.call("echo")
    yield channel
    channel.close()
    context.destroy(linger=0)


async def test_fields_and_tensors_make_the_round_trip(channel):
    big = os.urandom(3 << 20)
    fields = {"lr": 0.1, "names": ("a", "b"), "tensor": TensorData("uint8", (len(big),), big)}
    answer = await channel.call("echo", fields)
    assert answer.fields == fields
    assert answer.error is None
    assert answer.busy > 0


async def test_calls_may_overlap_and_are_answered_in_order(channel):
    finished = []

    async def call(number: int) -> None:
        assert (await channel.call("echo", {"number": number})).fields == {"number": number}
        finished.append(number)

    await asyncio.gather(*(call(number) for number in range(200)))
    assert finished == list(range(200))


LARGE = bytes(100 << 10)
"""More than goes past ZeroMQ."""


async def test_small_and_large_commands_are_carried_out_in_the_order_in_which_they_were_sent(channel):
    counts = []
    for sizes in ([0, 0, len(LARGE), 0], [len(LARGE), 0, 0], [0, len(LARGE)], [0]) * 10:
        calls = [channel.call("count", {"data": LARGE[:size]}) for size in sizes]
        counts += [answer.fields["count"] for answer in await asyncio.gather(*calls)]
    assert counts == list(range(1, 101))


async def test_rows_of_small_and_large_messages_come_in_the_order_of_the_steps(channel):
    found = []

    def steps(first: int, data: bytes) -> asyncio.Future[Any]:
        fields = {"steps": [first, first + 1], "part_seconds": 0.0, "part_row": 0, "follows": False, "data": data}
        return channel.call("train_steps", fields, lambda rows: found.extend(row.step for row in rows))

    await asyncio.gather(*(steps(2 * number, LARGE if number % 3 else b"") for number in range(60)))
    assert found == list(range(120))


async def test_a_rank_whose_direct_socket_cannot_be_found_is_reached_all_the_same(rank, tmp_path):
    (tmp_path / "rank.seq").unlink()
    context = zmq.Context()
    channel = RankChannel(context, f"ipc://{tmp_path}/rank.sock", "rank-x")
    assert (await channel.call("echo", {"a": 1})).fields == {"a": 1}
    channel.close()
    context.destroy(linger=0)


async def test_an_error_arrives_as_the_rank_raised_it(channel):
    error = (await channel.call("refuse")).error
    assert isinstance(error, InvalidArgument)
    assert (error.field, error.reason, error.message) == ("batch.inputs[0]", "SHAPE_MISMATCH", "too big")


async def test_steps_that_follow_on_some_that_failed_are_refused_until_others_begin_anew(channel):
    rows = []

    def steps(*numbers: int, follows: bool) -> asyncio.Future[Any]:
        fields = {"steps": numbers, "part_seconds": 60.0, "part_row": 1, "follows": follows}
        return channel.call("train_steps", fields, lambda found: rows.append([row.step for row in found]))

    calls = [
        steps(1, 2, 3, follows=False),
        steps(4, -5, 6, follows=True),
        steps(6, follows=True),
        steps(7, follows=True),
        steps(8, 9, follows=False),
        steps(10, follows=True),
    ]
    errors = [answer.error and answer.error.reason for answer in await asyncio.gather(*calls)]
    assert errors == [None, "OUT_OF_RANGE", "STEP_BEFORE_FAILED", "STEP_BEFORE_FAILED", None, None]
    assert [step for part in rows for step in part] == [1, 2, 3, 4, 8, 9, 10]
    # The first alone, those behind it together.
    assert rows[:2] == [[1], [2, 3]]


async def test_a_defect_in_the_rank_is_an_internal_error_and_the_rank_lives_on(channel):
    error = (await channel.call("nonsense")).error
    assert isinstance(error, InternalError)
    assert "ZeroDivisionError: nonsense" in error.message
    assert (await channel.call("echo", {"a": 1})).fields == {"a": 1}


async def test_an_answer_that_cannot_be_sent_is_an_internal_error_of_an_applied_command(channel):
    error = (await asyncio.wait_for(channel.call("answer what cannot be sent"), 5)).error
    assert isinstance(error, InternalError)
    assert error.outcome == "applied"
    assert "a message cannot hold a object" in error.message
    assert (await channel.call("echo", {"a": 1})).fields == {"a": 1}


async def test_a_rank_whose_serving_thread_ends_is_lost(channel):
    with pytest.raises(RankLost):
        await asyncio.wait_for(channel.call("end the thread"), 5)


async def test_a_call_right_after_an_idle_ranks_death_is_told_of_it(channel, rank):
    rank.kill()
    rank.wait()
    # The loop does not run meanwhile: nobody has read that the connection is closed.
    time.sleep(0.3)
    with pytest.raises(RankLost):
        await channel.call("echo")
    assert channel.lost is not None


@pytest.mark.parametrize("kind", ["exit", "sleep"])
async def test_a_rank_that_dies_in_the_middle_of_a_call_is_lost_within_two_seconds(channel, rank, kind):
    told = []
    channel.on_lost = told.append
    call = channel.call(kind, {"seconds": 60})
    if kind == "sleep":
        await asyncio.sleep(0.1)
        rank.send_signal(signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RankLost) as caught:
        await asyncio.wait_for(call, 5)
    assert time.monotonic() - started < 2
    assert caught.value.outcome == "unknown"
    assert told == [channel.lost]
    with pytest.raises(RankLost):
        await channel.call("echo")


async def test_an_idle_rank_that_dies_is_noticed_within_two_seconds(channel, rank):
    lost = asyncio.Event()
    channel.on_lost = lambda _: lost.set()
    rank.send_signal(signal.SIGKILL)
    await asyncio.wait_for(lost.wait(), 2)


async def test_the_rank_leaves_when_the_channel_is_closed_even_if_it_is_busy(channel, rank):
    call = channel.call("sleep", {"seconds": 60})
    await asyncio.sleep(0.1)
    channel.close()
    with pytest.raises(RankLost):
        await call
    assert await asyncio.to_thread(rank.wait, 2) == 0


async def test_a_rank_whose_frontend_never_comes_leaves(tmp_path):
    rank = start_rank(tmp_path, patience=0.3)
    assert await asyncio.to_thread(rank.wait, 3) == 0
    rank.communicate()


@pytest.mark.parametrize("kind", ["idle", "sleep"])
async def test_a_rank_that_is_stopped_is_lost_within_five_seconds_and_ends_when_it_wakes(channel, rank, kind):
    lost = asyncio.Event()
    channel.on_lost = lambda _: lost.set()
    call = channel.call("sleep", {"seconds": 60}) if kind == "sleep" else None
    await asyncio.sleep(0.1)
    rank.send_signal(signal.SIGSTOP)
    await asyncio.wait_for(lost.wait(), 5)
    if call is not None:
        with pytest.raises(RankLost):
            await call
    assert rank.poll() is None
    rank.send_signal(signal.SIGCONT)
    assert await asyncio.to_thread(rank.wait, 5) == 0


@pytest.mark.parametrize("kind", ["sleep", "hold the interpreter"])
async def test_a_rank_that_is_busy_for_longer_than_a_stopped_one_may_be_is_not_lost(channel, kind):
    started = time.monotonic()
    await channel.call(kind, {"seconds": 4})
    assert time.monotonic() - started >= 4
    assert (await channel.call("echo", {"a": 1})).fields == {"a": 1}


async def test_a_frontend_that_was_stopped_for_a_while_loses_no_rank(rank, tmp_path):
    script = Path(__file__).with_name("stopped_frontend.py")
    command = [sys.executable, script, f"ipc://{tmp_path}/rank.sock"]
    frontend = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert frontend.stdout is not None
    assert await asyncio.to_thread(frontend.stdout.readline) == "answered\n"
    frontend.send_signal(signal.SIGSTOP)
    await asyncio.sleep(5)
    assert rank.poll() is None
    frontend.send_signal(signal.SIGCONT)
    assert frontend.communicate("go on\n", timeout=20)[0] == "answered\n"


async def test_an_idle_channel_uses_no_processor_on_either_side(channel, rank):
    before, here = psutil.Process(rank.pid).cpu_times(), time.process_time()
    await asyncio.sleep(2)
    after = psutil.Process(rank.pid).cpu_times()
    assert after.user + after.system - before.user - before.system <= 0.01
    assert time.process_time() - here <= 0.02


async def test_closed_channels_leave_no_descriptors(channel, rank, tmp_path):
    await channel.call("echo")
    process = psutil.Process()
    counts = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        other = start_rank(folder)
        context = zmq.Context()
        extra = RankChannel(context, f"ipc://{folder}/rank.sock", "rank-y")
        await extra.call("echo")
        extra.close()
        context.destroy(linger=0)
        await asyncio.to_thread(other.wait, 2)
        other.communicate()
        counts.append((process.num_fds(), process.num_threads()))
    assert all(after <= before for after, before in zip(counts[-1], counts[1], strict=True)), counts
