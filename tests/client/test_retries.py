"""Calls that fail are sent again: the service runs each once, whatever was cut, and no call outlives its timeout."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import grpc
import pytest

from gradwire import errors
from gradwire.attempts import Attempts
from gradwire.deadline import Deadline
from gradwire.rpc import Rpc, new_request_id
from gradwire_proto import codec
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

# What a busy machine may add to a timeout of a second: still no hang.
SLACK = 0.7


class Ledger:
    """Runs a step once for each request id, as the service does, and notes each arrival. `on_arrival` comes first."""

    def __init__(self, size: int = 0) -> None:
        self.arrived: list[bytes] = []
        self.applied: list[str] = []
        self.on_arrival = lambda count: None
        self._size = size
        self.answers = {"TrainStep": self.train, "GetCommand": self.command}

    def train(self, request, context):
        self.arrived.append(request.SerializeToString())
        self.on_arrival(len(self.arrived))
        if request.request_id not in self.applied:
            self.applied.append(request.request_id)
        step = self.applied.index(request.request_id) + 1
        return pb.TrainStepResponse(result=model_pb2.StepResult(step=step, rank_rows=range(self._size)))

    def command(self, request, context):
        if request.name.rpartition("/")[2] in self.applied:
            return model_pb2.Command(name=request.name, state=model_pb2.COMMAND_STATE_APPLIED)
        raise errors.ModelNotFound("no such command", reason="COMMAND_NOT_FOUND")


@pytest.fixture
def ledger(scripted) -> Ledger:
    ledger = Ledger()
    scripted.answers |= ledger.answers
    return ledger


def train(rpc: Rpc, *, size: int = 0, timeout: float | None = None):
    request = pb.TrainStepRequest(name="models/m", request_id=new_request_id())
    request.batch.inputs.text = "x" * size
    deadline = Deadline(rpc.timeout if timeout is None else timeout)
    command = f"models/m/commands/{request.request_id}"
    return rpc.call("TrainStep", request, command=command, deadline=deadline)


def raises(error: Exception):
    raise error


# --- connections that break -----------------------------------------------------------------------------------------


def test_connection_that_is_cut_before_the_request_has_arrived(cut_rpc, proxy, ledger):
    proxy.up_left = 20_000
    assert train(cut_rpc, size=200_000).result.step == 1
    assert len(ledger.arrived) == len(ledger.applied) == 1
    assert proxy.up_left is None, "nothing was cut"


def test_connection_that_is_cut_after_the_request_has_arrived(cut_rpc, proxy, ledger):
    ledger.on_arrival = lambda count: proxy.cut() if count < 4 else None
    assert train(cut_rpc, size=1000).result.step == 1
    assert len(ledger.applied) == 1
    assert len(ledger.arrived) == 4 and len(set(ledger.arrived)) == 1, "a repeat had other bytes"
    assert train(cut_rpc).result.step == 2


def test_connection_that_is_cut_between_a_request_and_its_reply(cut_rpc, proxy, ledger):
    proxy.cut_after_request()
    assert train(cut_rpc, size=1000).result.step == 1
    assert len(ledger.arrived) == 2 and len(ledger.applied) == 1


def test_connection_that_is_cut_in_the_midst_of_the_reply(cut_rpc, proxy, scripted):
    ledger = Ledger(size=100_000)
    scripted.answers |= ledger.answers
    proxy.down_left = 30_000
    assert len(train(cut_rpc).result.rank_rows) == 100_000
    assert len(ledger.arrived) == 2 and len(ledger.applied) == 1
    assert proxy.down_left is None, "nothing was cut"


def test_read_whose_connection_is_cut_is_repeated(cut_rpc, proxy, scripted):
    def model(request, context):
        if len(scripted.requests("GetModel")) == 1:
            proxy.cut()
        return model_pb2.Model(name=request.name, step=7)

    scripted.answers["GetModel"] = model
    assert cut_rpc.call("GetModel", pb.GetModelRequest(name="models/m")).step == 7
    assert len(scripted.requests("GetModel")) == 2


def test_call_to_a_service_that_is_away_waits_for_it(scripted, start_scripted):
    ledger, port = Ledger(), scripted.port
    scripted.stop()
    threading.Timer(0.5, lambda: start_scripted(port=port, answers=ledger.answers)).start()
    rpc = Rpc(f"127.0.0.1:{port}", timeout=8.0)
    assert train(rpc).result.step == 1
    assert len(ledger.arrived) == 1
    rpc.close()


def test_service_that_stays_away_is_waited_for_until_the_time_is_spent(scripted):
    scripted.stop()
    rpc = Rpc(scripted.target, timeout=2.0)
    start = time.monotonic()
    with pytest.raises(errors.Unavailable) as caught:
        train(rpc)
    # Nobody needs to be asked what became of it: no time is kept for that.
    assert 1.8 < time.monotonic() - start < 2.0 + SLACK
    assert (caught.value.reason, caught.value.outcome) == ("NOT_CONNECTED", "not_applied")
    rpc.close()


def test_service_that_is_killed_and_started_again_on_its_port_is_found_again(free_server):
    rpc = Rpc(free_server.target, timeout=20.0)
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    os.kill(free_server.pid, signal.SIGKILL)
    back = []
    threading.Timer(0.3, lambda: free_server.start() or back.append(time.monotonic())).start()
    assert codec.decode_server_info(rpc.call("GetServerInfo", pb.GetServerInfoRequest())).workers == 4
    found = time.monotonic()
    rpc.close()
    eventually = time.monotonic() + 10
    while not back and time.monotonic() < eventually:
        time.sleep(0.01)
    assert found - back[0] < 3, "it was looked for too seldom"


def test_service_that_stops_in_the_midst_of_a_command_is_asked_again_when_it_is_back(scripted, start_scripted, rpc):
    first, second, port, stopped = Ledger(), Ledger(), scripted.port, threading.Event()
    scripted.answers |= first.answers

    def stop(count: int) -> None:
        threading.Thread(target=restart).start()
        stopped.wait(10)

    def restart() -> None:
        scripted.stop()
        start_scripted(port=port, answers=second.answers)
        stopped.set()

    first.on_arrival = stop
    assert train(rpc).result.step == 1
    assert second.arrived == first.arrived and len(second.applied) == 1


@pytest.mark.parametrize(
    ("code", "words", "comes_again"),
    [
        (grpc.StatusCode.CANCELLED, "the service was torn down", True),
        (grpc.StatusCode.UNKNOWN, "Stream removed", True),
        (grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2", True),
        (grpc.StatusCode.UNAVAILABLE, "of a proxy on the way", True),
        (grpc.StatusCode.UNKNOWN, "Exception calling application", False),
        (grpc.StatusCode.INTERNAL, "a defect", False),
    ],
)
def test_status_that_no_service_of_ours_gave_is_a_broken_connection_or_a_defect(
    rpc, scripted, code, words, comes_again
):
    ledger = Ledger()

    def answer(request, context):
        reply = ledger.train(request, context)
        return context.abort(code, words) if len(ledger.arrived) == 1 else reply

    scripted.answers |= ledger.answers | {"TrainStep": answer}
    if comes_again:
        assert train(rpc).result.step == 1
    else:
        with pytest.raises(errors.GradwireError):
            train(rpc)
    assert len(ledger.arrived) == 1 + comes_again and len(ledger.applied) == 1


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        errors.Unavailable("is brought back", reason="MODEL_RECOVERING"),
        errors.Unavailable("stops", reason="DRAINING", retry_after=0.05),
        errors.ResourceExhausted("many wait", reason="QUEUE_FULL", retryable=True, retry_after=0.05),
        errors.FailedPrecondition("is being made", reason="MODEL_NOT_READY", retryable=True, retry_after=0.05),
    ],
)
def test_refusal_that_passes_is_waited_out(rpc, ledger, refusal):
    ledger.on_arrival = lambda count: raises(refusal) if count < 3 else None
    assert train(rpc).result.step == 1
    assert len(ledger.arrived) == 3 and len(set(ledger.arrived)) == 1 and len(ledger.applied) == 1


def test_service_that_says_when_to_come_again_is_not_asked_before(rpc, ledger):
    refusal = errors.ResourceExhausted("many wait", reason="QUEUE_FULL", retryable=True, retry_after=0.4)
    ledger.on_arrival = lambda count: raises(refusal) if count < 2 else None
    start = time.monotonic()
    train(rpc)
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(
    "refusal",
    [
        errors.InvalidArgument("expected 3"),
        errors.RankLost("rank 1 died", outcome="unknown"),
        errors.ResourceExhausted("2 of 4 are free", reason="WORKERS_EXHAUSTED", retryable=True),
        errors.Unavailable("was lost on the way", outcome="applied"),
        errors.FailedPrecondition("is full of NaN", reason="MODEL_FAILED"),
    ],
)
def test_refusal_that_stays_is_raised_at_once(rpc, ledger, refusal):
    ledger.on_arrival = lambda count: raises(refusal)
    with pytest.raises(type(refusal), match=refusal.message) as caught:
        train(rpc)
    assert len(ledger.arrived) == 1
    assert caught.value.outcome == refusal.outcome


# --- the end of a call's time ---------------------------------------------------------------------------------------


def test_refusal_that_does_not_pass_is_raised_when_the_time_is_spent(rpc, ledger):
    ledger.on_arrival = lambda count: raises(errors.Unavailable("is brought back", reason="MODEL_RECOVERING"))
    start = time.monotonic()
    with pytest.raises(errors.Unavailable) as caught:
        train(rpc, timeout=1.0)
    assert 0.5 < time.monotonic() - start < 1.0 + SLACK
    assert (caught.value.reason, caught.value.outcome) == ("MODEL_RECOVERING", "not_applied")
    assert len(ledger.arrived) > 3


def test_retry_after_beyond_the_timeout_does_not_prolong_the_call(rpc, ledger):
    refusal = errors.Unavailable("stops", reason="DRAINING", retry_after=60.0)
    ledger.on_arrival = lambda count: raises(refusal)
    start = time.monotonic()
    with pytest.raises(errors.Unavailable, match="stops"):
        train(rpc, timeout=1.0)
    assert time.monotonic() - start < 1.0 + SLACK


@pytest.mark.parametrize("applies", [True, False])
def test_command_whose_answer_was_lost_is_asked_about_when_the_time_is_spent(cut_rpc, proxy, ledger, applies):
    def lose_the_first(count: int) -> None:
        if count > 1:
            raise errors.Unavailable("is brought back", reason="MODEL_RECOVERING")
        proxy.cut()
        if not applies:
            raise errors.InternalError("nobody hears this")

    ledger.on_arrival = lose_the_first
    with pytest.raises(errors.Unavailable) as caught:
        train(cut_rpc, timeout=1.0)
    assert caught.value.reason == "MODEL_RECOVERING"
    assert caught.value.outcome == ("applied" if applies else "not_applied")


def test_command_whose_answer_was_lost_has_an_unknown_outcome_where_nobody_can_be_asked(cut_rpc, proxy, ledger):
    ledger.on_arrival = lambda count: proxy.close()
    with pytest.raises(errors.Unavailable) as caught:
        train(cut_rpc, timeout=1.0)
    assert (caught.value.reason, caught.value.outcome) == ("NOT_CONNECTED", "unknown")
    assert caught.value.request_id == ledger.applied[0]


@pytest.mark.parametrize("then", ["away", "full"])
def test_command_of_which_the_service_does_not_know_stays_unknown_whatever_its_repeats_hear(scripted, then):
    full = errors.ResourceExhausted("64 wait", reason="QUEUE_FULL", retryable=True, retry_after=0.1)
    unknown = errors.Unavailable("cannot make it durable", reason="STORAGE_UNREACHABLE", outcome="unknown")

    def step(request, context):
        if then == "away":
            threading.Timer(0.05, scripted.stop).start()
        raise unknown if len(scripted.requests("TrainStep")) == 1 else full

    scripted.answers["TrainStep"] = step
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(name=request.name)
    rpc = Rpc(scripted.target, timeout=2.0)
    with pytest.raises(errors.GradwireError) as caught:
        train(rpc)
    assert caught.value.reason == ("NOT_CONNECTED" if then == "away" else "QUEUE_FULL")
    assert caught.value.outcome == "unknown"
    rpc.close()


def test_slow_service_is_not_asked_twice(rpc, ledger):
    ledger.on_arrival = lambda count: time.sleep(1.2)
    with pytest.raises(errors.DeadlineExceeded):
        train(rpc, timeout=1.0)
    assert len(ledger.arrived) == 1


def test_closing_the_client_ends_the_wait(scripted, ledger):
    rpc = Rpc(scripted.target, timeout=30.0)
    ledger.on_arrival = lambda count: raises(errors.Unavailable("stops", retry_after=20.0))
    threading.Timer(0.4, rpc.close).start()
    start = time.monotonic()
    with pytest.raises(errors.Cancelled) as caught:
        train(rpc)
    assert time.monotonic() - start < 5
    assert (caught.value.reason, caught.value.outcome) == ("CLIENT_CLOSED", "not_applied")


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def interrupt_soon() -> None:
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_ctrl_c_while_the_service_is_away_ends_the_wait_and_nothing_was_applied(scripted):
    scripted.stop()
    rpc = Rpc(scripted.target, timeout=30.0)
    interrupt_soon()
    start = time.monotonic()
    with pytest.raises(errors.Interrupted) as caught:
        train(rpc)
    assert time.monotonic() - start < 5
    assert caught.value.outcome == "not_applied"
    rpc.close()


def test_ctrl_c_in_the_wait_after_a_lost_answer_knows_the_outcome(cut_rpc, proxy, ledger):
    def lose_the_first(count: int) -> None:
        if count > 1:
            raise errors.Unavailable("is brought back", reason="MODEL_RECOVERING", retry_after=6.0)
        proxy.cut()

    ledger.on_arrival = lose_the_first
    interrupt_soon()
    start = time.monotonic()
    with pytest.raises(errors.Interrupted) as caught:
        train(cut_rpc)
    assert time.monotonic() - start < 3
    assert (caught.value.outcome, caught.value.request_id) == ("applied", ledger.applied[0])


def test_ctrl_c_in_the_wait_of_a_read_is_a_plain_keyboard_interrupt(scripted):
    scripted.stop()
    rpc = Rpc(scripted.target, timeout=30.0)
    interrupt_soon()
    with pytest.raises(KeyboardInterrupt) as caught:
        rpc.call("GetModel", pb.GetModelRequest(name="models/m"))
    assert not isinstance(caught.value, errors.Interrupted)
    rpc.close()


# --- calls that are no commands -------------------------------------------------------------------------------------


def delete(rpc: Rpc, **options) -> None:
    rpc.call("DeleteModel", pb.DeleteModelRequest(name="models/m"), deletes=True, **options)


def test_deletion_whose_answer_was_lost_has_succeeded_where_the_repeat_finds_nothing(cut_rpc, proxy, scripted):
    def once(request, context):
        if len(scripted.requests("DeleteModel")) > 1:
            raise errors.ModelNotFound("there is no model", reason="MODEL_NOT_FOUND")
        proxy.cut()
        return scripted.answers["GetServerInfo"](request, context)

    scripted.answers["DeleteModel"] = once
    delete(cut_rpc)
    assert len(scripted.requests("DeleteModel")) == 2


def test_deletion_of_what_was_never_there_is_not_found(rpc, scripted):
    scripted.answers["DeleteModel"] = lambda request, context: raises(errors.ModelNotFound("there is no model"))
    with pytest.raises(errors.ModelNotFound):
        delete(rpc)


def test_call_that_is_not_to_be_repeated_is_sent_once(rpc, scripted):
    scripted.answers["Release"] = lambda request, context: raises(errors.Unavailable("stops"))
    with pytest.raises(errors.Unavailable):
        rpc.call("Release", pb.ReleaseRequest(), repeat=False)
    assert len(scripted.requests("Release")) == 1


# --- waits ----------------------------------------------------------------------------------------------------------


def waits_of(monkeypatch, count: int, seconds: float) -> list[float]:
    """What an Attempts waits, on a clock that only its waits move."""
    now, waits = [100.0], []

    class Closed(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            now[0] += timeout
            return False

    monkeypatch.setattr("gradwire.deadline.time.monotonic", lambda: now[0])
    deadline = Deadline(seconds)
    attempts = Attempts(deadline, Closed())
    with deadline.running():
        for _ in range(count):
            if not attempts.wait(errors.Unavailable(), lambda seconds: None):
                break
    assert now[0] <= 100.0 + seconds
    return waits


def test_waits_grow_and_differ_from_client_to_client(monkeypatch):
    many = [waits_of(monkeypatch, 12, 1000.0) for _ in range(50)]
    first, last = [waits[0] for waits in many], [waits[-1] for waits in many]
    assert max(first) <= 0.05 and max(last) <= 2.0
    assert max(last) > 1.0 and min(last) < 1.0, "the jitter is not full"
    assert len({tuple(waits) for waits in many}) == 50


def test_waits_end_with_the_time_and_leave_some_for_the_last_attempt(monkeypatch):
    waits = waits_of(monkeypatch, 100, 3.0)
    assert len(waits) < 30 and sum(waits) < 3.0 - 0.01
    assert waits_of(monkeypatch, 100, 0.02) == []


def test_users_random_numbers_stay_as_they_would_be(rpc, ledger):
    ledger.on_arrival = lambda count: raises(errors.Unavailable("stops")) if count < 3 else None
    random.seed(5)
    expected = random.random()
    random.seed(5)
    train(rpc)
    assert random.random() == expected
