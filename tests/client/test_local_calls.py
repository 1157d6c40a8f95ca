"""Calls past gRPC: answered by a service on this machine, and what the SDK makes of one that does not answer."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from client.local_service import LocalService

from gradwire.attempts import Lost
from gradwire.local_calls import LocalCalls
from gradwire.local_transport import LocalTransport
from gradwire.rpc import Rpc
from gradwire_proto.errors import DeadlineExceeded, InvalidArgument, Unavailable
from gradwire_proto.local_wire import CALL_BYTES, has_seals
from gradwire_proto.status import to_status
from gradwire_proto.v1 import gradient_service_pb2 as service_pb
from gradwire_proto.v1 import local_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import TensorData

STEP = service_pb.TrainStepResponse(result=model_pb2.StepResult(step=7))
COMMAND = "models/m/commands/r"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[LocalService]:
    service = LocalService(tmp_path)
    service.answer = lambda request, files: (pb.LocalReply(response=STEP.SerializeToString()), [])
    yield service
    service.close()


@pytest.fixture
def calls(service: LocalService) -> Iterator[LocalCalls]:
    local = LocalTransport(lambda seconds: service.path)
    local.offer(service.path)
    calls = LocalCalls(local, "target")
    yield calls
    calls.close()
    local.close()


def ask(calls: LocalCalls, body: bytes = b"body", timeout: float = 5.0) -> Any:
    return calls.ask("TrainStep", body, timeout, COMMAND)


def test_call_is_answered_and_the_connection_serves_the_next(service, calls):
    assert [ask(calls), ask(calls)] == [STEP, STEP]
    sent = [request.call for request in service.requests]
    assert [(each.method, each.request) for each in sent] == [("TrainStep", b"body")] * 2
    assert 0 < sent[0].timeout_seconds <= 5.0
    assert service.connections == 2, "one of the transport's, one for both calls"


def test_error_of_the_service_arrives_with_all_its_attributes(service, calls):
    error = InvalidArgument("expected 3", field="batch.inputs[0]", reason="SHAPE_MISMATCH")
    service.answer = lambda request, files: (pb.LocalReply(error=to_status(error)), [])
    with pytest.raises(InvalidArgument) as caught:
        ask(calls)
    assert caught.value.attributes() == error.attributes() | {"request_id": "r"}


def test_service_that_hangs_up_after_the_request_may_have_carried_it_out(service, calls):
    service.answer = lambda request, files: None
    with pytest.raises(Lost) as caught:
        ask(calls)
    error = caught.value.error
    assert isinstance(error, Unavailable) and error.retryable
    assert (error.reason, error.outcome, error.request_id) == ("CONNECTION_LOST", "unknown", "r")


def test_service_that_says_nothing_is_given_up_in_time(service, calls):
    service.answer = lambda request, files: time.sleep(1.0)
    begin = time.monotonic()
    with pytest.raises(Lost) as caught:
        ask(calls, timeout=0.2)
    assert time.monotonic() - begin < 0.8
    error = caught.value.error
    assert isinstance(error, DeadlineExceeded)
    assert (error.reason, error.outcome, error.request_id) == ("NO_ANSWER", "unknown", "r")


def test_service_that_knows_no_calls_is_asked_by_grpc(service, calls):
    refusal = pb.LocalRefusal(reason="UNKNOWN_FIELD", message="no")
    service.answer = lambda request, files: (pb.LocalReply(refusal=refusal), [])
    assert ask(calls) is None
    assert ask(calls) is None and len(service.requests) == 1, "it is left alone for a while"


@pytest.mark.parametrize("nbytes", [(64 << 10) - 256, (64 << 10) - 255, 64 << 10, CALL_BYTES])
def test_request_of_any_size_that_is_taken_fits(service, calls, nbytes):
    assert ask(calls, bytes(nbytes)) == STEP


def test_calls_of_more_threads_than_there_are_connections_go_by_grpc(service, calls):
    may_answer = threading.Event()
    service.answer = lambda request, files: (
        may_answer.wait(5) and pb.LocalReply(response=STEP.SerializeToString()),
        [],
    )
    replies: list[Any] = []
    threads = [threading.Thread(target=lambda: replies.append(ask(calls))) for _ in range(4)]
    for each in threads:
        each.start()
    while len(service.requests) < 4:
        time.sleep(0.01)
    assert ask(calls) is None
    may_answer.set()
    for each in threads:
        each.join()
    assert replies == [STEP] * 4 and ask(calls) == STEP


def test_service_that_has_left_since_the_last_call_gets_no_request(service, calls):
    assert ask(calls) == STEP
    service.hang_up()
    assert ask(calls) is None and len(service.requests) == 1


def test_closing_wakes_a_call_that_waits(service, calls):
    service.answer = lambda request, files: time.sleep(2.0)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            ask(calls)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not service.requests:
        time.sleep(0.01)
    begin = time.monotonic()
    calls.close()
    thread.join()
    assert time.monotonic() - begin < 1.0
    assert isinstance(caught[0], Lost) and ask(calls) is None


def test_call_that_is_interrupted_leaves_no_answer_for_the_next(service, calls, monkeypatch):
    answers = iter([model_pb2.StepResult(step=1), model_pb2.StepResult(step=2)])

    def answer(request, files):
        return pb.LocalReply(response=service_pb.TrainStepResponse(result=next(answers)).SerializeToString()), []

    def interrupted(*_):
        raise KeyboardInterrupt

    service.answer = answer
    with monkeypatch.context() as patch:
        patch.setattr("gradwire.call_connection.receive_packet", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(calls)
    calls._again_at = 0.0
    assert ask(calls).result.step == 2


def test_every_connection_brings_the_clients_token(service, scripted):
    rpc = Rpc(scripted.target, token="secret", timeout=5)
    rpc.local.offer(service.path)
    service.answer = lambda request, files: (pb.LocalReply(response=STEP.SerializeToString()), [])
    assert rpc.call("TrainStep", service_pb.TrainStepRequest(name="models/m")) == STEP
    # That of memory, and that of calls.
    assert service.tokens == ["secret", "secret"] and not scripted.tokens
    # Where it is not taken, gRPC says why.
    service.answer = lambda request, files: (pb.LocalReply(refusal=pb.LocalRefusal(reason="TOKEN_REVOKED")), [])
    scripted.answers["TrainStep"] = lambda request, context: STEP
    assert rpc.call("TrainStep", service_pb.TrainStepRequest(name="models/m")) == STEP
    assert scripted.tokens == ["Bearer secret"]
    rpc.close()


def test_command_whose_answer_is_lost_comes_again_by_grpc(service, scripted):
    rpc = Rpc(scripted.target, timeout=5)
    rpc.local.offer(service.path)
    service.answer = lambda request, files: None
    scripted.answers["TrainStep"] = lambda request, context: STEP
    request = service_pb.TrainStepRequest(name="models/m", request_id="a")
    assert rpc.call("TrainStep", request, command="models/m/commands/a") == STEP
    assert [each.call.request for each in service.requests] == [request.SerializeToString()]
    assert scripted.requests("TrainStep") == [request]
    rpc.close()


def test_request_that_does_not_fit_into_a_packet_comes_in_one_file_call_after_call(service, calls):
    seen: list[tuple[bytes, int]] = []

    def answer(request: Any, files: list[int]) -> Any:
        (file,) = files
        assert not request.call.request and has_seals(file, fcntl.F_SEAL_SHRINK)
        seen.append((os.pread(file, request.call.request_bytes, 0), os.fstat(file).st_ino))
        return pb.LocalReply(response=STEP.SerializeToString()), []

    service.answer = answer
    bodies = [b"a" * 100_000, b"b" * 70_000, b"c" * 300_000]
    assert [ask(calls, body) for body in bodies] == [STEP] * 3
    assert [body for body, _ in seen] == bodies
    assert len({number for _, number in seen}) == 1


def test_request_that_is_too_big_goes_by_grpc(service, calls):
    assert ask(calls, bytes(CALL_BYTES + 1)) is None
    assert not service.requests


def test_response_in_a_file_is_read_and_one_that_is_not_whole_is_asked_for_again(service, calls, open_files):
    def answer(request: Any, files: list[int]) -> Any:
        file = os.memfd_create("response")
        os.write(file, STEP.SerializeToString())
        sent.append(file)
        return pb.LocalReply(response=b"", response_bytes=size), [file]

    sent: list[int] = []
    size = STEP.ByteSize()
    service.answer = answer
    before = open_files()
    assert ask(calls) == STEP
    size += 1
    with pytest.raises(Lost):
        ask(calls)
    for file in sent:
        os.close(file)
    # The connection that broke is gone, at both ends soon, and no file is left.
    end = time.monotonic() + 5
    while open_files() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert open_files() <= before


def test_tensors_that_came_along_are_not_asked_for(service, calls):
    content = torch.arange(40_000)

    def answer(request: Any, files: list[int]) -> Any:
        file = os.memfd_create("tensors")
        os.write(file, content.numpy().tobytes())
        brought = pb.LocalBrought(name="downloads/d", places=[pb.LocalPlace(nbytes=320_000)])
        return pb.LocalReply(response=b"", brought=brought), [file]

    service.answer = answer
    local = calls._local
    assert calls.ask("ComputeGradients", b"", 5.0, None) == service_pb.ComputeGradientsResponse()
    (found,) = local.download("downloads/d", [TensorData("int64", (40_000,), b"")])
    assert torch.equal(found, content) and len(service.requests) == 1
    # Those that nobody asks for do not pile up.
    for _ in range(40):
        calls.ask("ComputeGradients", b"", 5.0, None)
    assert len(local._brought) <= 16
