"""One call: what it returns, what it raises, and that it ends in time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
import time

import psutil
import pytest
from processes import stop

from gradwire import errors
from gradwire.deadline import Deadline
from gradwire.rpc import Rpc, new_request_id
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

APPLIED, NOT_APPLIED, RUNNING = (
    model_pb2.COMMAND_STATE_APPLIED,
    model_pb2.COMMAND_STATE_NOT_APPLIED,
    model_pb2.COMMAND_STATE_RUNNING,
)

# What a busy machine may add to a timeout of a second: still no hang.
SLACK = 0.7


def train_step(rpc: Rpc, *, timeout: float | None = None):
    request = pb.TrainStepRequest(name="models/m", request_id=new_request_id())
    deadline = Deadline(rpc.timeout if timeout is None else timeout)
    command = f"models/m/commands/{request.request_id}"
    return rpc.call("TrainStep", request, command=command, deadline=deadline)


def never_answers(service):
    """An answer that comes only when the service stops."""
    return lambda request, context: service.release.wait(30) and pb.TrainStepResponse()


def raises(error: Exception):
    def answer(request, context):
        raise error

    return answer


def command_in(state):
    return lambda request, context: model_pb2.Command(name=request.name, state=state)


def test_reply_comes_back(scripted, rpc):
    scripted.answers["TrainStep"] = lambda request, context: pb.TrainStepResponse(result=model_pb2.StepResult(step=7))
    assert train_step(rpc).result.step == 7


def test_token_travels_with_every_call(scripted):
    rpc = Rpc(scripted.target, token="secret", timeout=5)
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    assert scripted.tokens == ["Bearer secret"]
    rpc.close()


def test_error_of_the_service_arrives_with_all_its_attributes(scripted, rpc):
    sent = errors.InvalidArgument("expected 3", field="batch.inputs[0]", reason="SHAPE_MISMATCH", request_id="r-1")
    scripted.answers["TrainStep"] = raises(sent)
    with pytest.raises(errors.InvalidArgument, match="expected 3") as caught:
        train_step(rpc)
    assert caught.value.attributes() == sent.attributes()
    assert isinstance(caught.value, ValueError)


def test_dead_server_is_unavailable_within_the_timeout_and_nothing_was_applied():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        rpc = Rpc(f"127.0.0.1:{unused.getsockname()[1]}", timeout=1.0)
        start = time.monotonic()
        with pytest.raises(errors.Unavailable, match="no gradwire service") as caught:
            train_step(rpc)
        assert 0.5 < time.monotonic() - start < 1.0 + SLACK
        assert caught.value.outcome == "not_applied" and caught.value.retryable
        rpc.close()


def test_server_that_accepts_and_says_nothing_is_unavailable_within_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        rpc = Rpc(f"127.0.0.1:{silent.getsockname()[1]}", timeout=1.0)
        start = time.monotonic()
        with pytest.raises(errors.Unavailable) as caught:
            rpc.call("GetServerInfo", pb.GetServerInfoRequest())
        assert time.monotonic() - start < 1.0 + SLACK
        assert caught.value.retryable
        rpc.close()


def test_slow_read_is_deadline_exceeded_within_the_timeout(scripted, rpc):
    scripted.answers["GetModel"] = never_answers(scripted)
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="within 1 s"):
        rpc.call("GetModel", pb.GetModelRequest(name="models/m"), deadline=Deadline(1.0))
    assert time.monotonic() - start < 1.0 + SLACK


@pytest.mark.parametrize(
    ("state", "outcome"), [(APPLIED, "applied"), (NOT_APPLIED, "not_applied"), (RUNNING, "unknown")]
)
def test_deadline_of_a_command_says_what_became_of_it(scripted, rpc, state, outcome):
    scripted.answers["TrainStep"] = never_answers(scripted)
    scripted.answers["GetCommand"] = command_in(state)
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded) as caught:
        train_step(rpc, timeout=1.0)
    assert time.monotonic() - start < 1.0 + SLACK
    assert caught.value.outcome == outcome
    asked = scripted.requests("GetCommand")[0].name
    assert asked == f"models/m/commands/{caught.value.request_id}"


def test_command_that_ends_while_the_deadline_is_settled_counts_as_applied(scripted, rpc):
    scripted.answers["TrainStep"] = never_answers(scripted)

    def get_command(request, context):
        if request.wait:
            time.sleep(0.05)
        return model_pb2.Command(state=APPLIED if request.wait else RUNNING)

    scripted.answers["GetCommand"] = get_command
    with pytest.raises(errors.DeadlineExceeded, match="it was applied") as caught:
        train_step(rpc, timeout=1.0)
    assert caught.value.outcome == "applied"


def test_command_that_never_reached_the_service_was_not_applied(scripted, rpc):
    scripted.answers["TrainStep"] = never_answers(scripted)
    scripted.answers["GetCommand"] = raises(errors.ModelNotFound("no such command", reason="COMMAND_NOT_FOUND"))
    with pytest.raises(errors.DeadlineExceeded) as caught:
        train_step(rpc, timeout=1.0)
    assert caught.value.outcome == "not_applied"


@pytest.mark.parametrize("came", [True, False])
def test_recovering_model_is_asked_again_what_became_of_the_command(scripted, rpc, came):
    scripted.answers["TrainStep"] = never_answers(scripted)

    def get_command(request, context):
        if len(scripted.requests("GetCommand")) < 4:
            raise errors.Unavailable("is brought back", reason="MODEL_RECOVERING", retry_after=0.02)
        if not came:
            raise errors.ModelNotFound("no such command", reason="COMMAND_NOT_FOUND")
        return model_pb2.Command(state=APPLIED)

    scripted.answers["GetCommand"] = get_command
    with pytest.raises(errors.DeadlineExceeded) as caught:
        train_step(rpc, timeout=3.0)
    assert caught.value.outcome == ("applied" if came else "not_applied")
    # First whether it lives, then until it knows.
    assert [request.wait for request in scripted.requests("GetCommand")] == [False, True, True, True]


def test_model_that_goes_on_recovering_leaves_the_outcome_unknown_on_a_service_that_is_alive(scripted, rpc):
    scripted.answers["TrainStep"] = never_answers(scripted)
    scripted.answers["GetCommand"] = raises(errors.Unavailable("is brought back", reason="MODEL_RECOVERING"))
    start = time.monotonic()
    with pytest.raises(errors.DeadlineExceeded, match="may be applied yet") as caught:
        train_step(rpc, timeout=1.0)
    assert time.monotonic() - start < 1.0 + SLACK
    assert caught.value.outcome == "unknown" and len(scripted.requests("GetCommand")) > 1


def test_connection_lost_in_a_command_leaves_the_outcome_unknown(scripted, rpc):
    arrived = threading.Event()

    def answer(request, context):
        arrived.set()
        scripted.release.wait(30)
        return pb.TrainStepResponse()

    scripted.answers["TrainStep"] = answer
    threading.Thread(target=lambda: (arrived.wait(), scripted._server.stop(0))).start()
    with pytest.raises(errors.Unavailable) as caught:
        train_step(rpc, timeout=1.0)
    # In the end nothing listened: which does not mean that nothing was applied.
    assert (caught.value.reason, caught.value.outcome) == ("NOT_CONNECTED", "unknown")


def test_server_that_stops_answering_in_a_command_is_unavailable_and_unknown(free_server):
    rpc = Rpc(free_server.target, timeout=1.0)
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    stop(free_server.pid)
    try:
        start = time.monotonic()
        with pytest.raises(errors.Unavailable) as caught:
            train_step(rpc)
        assert time.monotonic() - start < 1.0 + SLACK
        assert caught.value.outcome == "unknown"
    finally:
        os.kill(free_server.pid, signal.SIGCONT)
        rpc.close()


@pytest.mark.parametrize(("state", "outcome"), [(APPLIED, "applied"), (NOT_APPLIED, "not_applied")])
def test_ctrl_c_in_a_command_is_a_keyboard_interrupt_that_knows_the_outcome(scripted, rpc, state, outcome):
    cancelled = threading.Event()

    def answer(request, context):
        context.add_callback(cancelled.set)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
        scripted.release.wait(30)
        return pb.TrainStepResponse()

    scripted.answers["TrainStep"] = answer
    scripted.answers["GetCommand"] = command_in(state)
    with pytest.raises(KeyboardInterrupt) as caught:
        train_step(rpc)
    assert isinstance(caught.value, errors.Interrupted)
    assert caught.value.outcome == outcome
    assert caught.value.request_id and caught.value.request_id in str(caught.value)
    assert cancelled.wait(2), "the call was left running"


def connections_to(port: int) -> int:
    connections = psutil.Process().net_connections("tcp")
    return sum(bool(each.raddr) and each.raddr.port == port for each in connections)


@pytest.mark.parametrize("end", ["answered", "refused", "late"])
def test_closing_ends_the_connection_however_its_calls_ended(scripted, rpc, end):
    def answer(request, context):
        if end == "refused":
            raise errors.InvalidArgument("no")
        if end == "late":
            scripted.release.wait(10)
        return pb.TrainStepResponse()

    scripted.answers["TrainStep"] = answer
    scripted.answers["GetCommand"] = command_in(APPLIED)
    try:
        train_step(rpc, timeout=0.5)
    except errors.GradwireError:
        assert end != "answered"
    assert connections_to(scripted.port) == 1
    rpc.close()
    deadline = time.monotonic() + 3
    while connections_to(scripted.port) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert connections_to(scripted.port) == 0


def test_closed_client_refuses_calls(rpc):
    rpc.close()
    with pytest.raises(errors.FailedPrecondition, match="closed"):
        rpc.call("GetServerInfo", pb.GetServerInfoRequest())


def test_closing_ends_calls_in_flight(scripted, rpc):
    scripted.answers["TrainStep"] = never_answers(scripted)
    threading.Timer(0.3, rpc.close).start()
    with pytest.raises(errors.Cancelled) as caught:
        train_step(rpc)
    assert caught.value.outcome == "unknown"


def call_in_child(rpc: Rpc, answers) -> None:
    try:
        rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    except errors.GradwireError as error:
        answers.send(error.reason)
    rpc.close()


def test_forked_child_gets_a_clear_error_and_leaves_its_parent_alone(scripted, rpc):
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=call_in_child, args=(rpc, sender))
    child.start()
    assert receiver.poll(10) and receiver.recv() == "CLIENT_FORKED"
    child.join(10)
    assert child.exitcode == 0
    rpc.call("GetServerInfo", pb.GetServerInfoRequest())
