"""Errors arrive on the other side of a real gRPC server as they were raised, and grpc's own become ours."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import grpc.aio
import pytest
from google.rpc import code_pb2, error_details_pb2
from grpc_status import rpc_status

from gradwire_proto import errors
from gradwire_proto.errors import GradwireError
from gradwire_proto.status import STATUS_OF, abort_arguments, from_rpc_error, to_status
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc

ATTRIBUTES = {
    "reason": "SOME_REASON",
    "field": 'tensors["fc.weight"]',
    "request_id": "5f8d1c1e-5c9c-4d0e-9a53-6b1f2c3d4e5f",
    "retryable": True,
    "retry_after": 1.5,
    "outcome": "unknown",
    "resource": "models/digits",
}
KINDS = list(STATUS_OF)


class Failing(pb_grpc.GradientServiceServicer):
    """Fails every call: with `error` where one is set, otherwise as each method says."""

    def __init__(self) -> None:
        self.error: GradwireError | None = None
        self.leave = threading.Event()

    def GetModel(self, request, context):
        assert self.error is not None
        context.set_trailing_metadata(abort_arguments(self.error)[2])
        context.abort(*abort_arguments(self.error)[:2])

    def TrainStep(self, request, context):
        raise RuntimeError("a defect")

    def GetServerInfo(self, request, context):
        return pb.GetServerInfoResponse(version="x" * (5 << 20))

    def DeleteModel(self, request, context):
        self.leave.wait(20)


@pytest.fixture
def service() -> Iterator[tuple[Failing, str, grpc.Server]]:
    servicer, server = Failing(), grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_GradientServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield servicer, f"127.0.0.1:{port}", server
    servicer.leave.set()
    server.stop(0).wait()


@pytest.fixture
def stub(service: tuple[Failing, str, grpc.Server]) -> Iterator[pb_grpc.GradientServiceStub]:
    with grpc.insecure_channel(service[1]) as channel:
        yield pb_grpc.GradientServiceStub(channel)


def caught(call: Callable[[], object], *, command: bool = True, request_id: str | None = None) -> GradwireError:
    with pytest.raises(grpc.RpcError) as raised:
        call()
    return from_rpc_error(raised.value, command=command, request_id=request_id)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attributes", [{}, ATTRIBUTES])
def test_error_arrives_as_it_was_raised(service, stub, kind: type[GradwireError], attributes: dict) -> None:
    service[0].error = kind("what went wrong: ä, 数", **attributes)
    arrived = caught(lambda: stub.GetModel(pb.GetModelRequest()))
    assert type(arrived) is kind
    assert arrived.message == "what went wrong: ä, 数"
    assert arrived.attributes() == service[0].error.attributes()


@pytest.mark.parametrize("kind", KINDS)
async def test_error_arrives_through_grpc_aio_too(kind: type[GradwireError]) -> None:
    class Servicer(pb_grpc.GradientServiceServicer):
        async def GetModel(self, request, context):
            await context.abort(*abort_arguments(kind("what", **ATTRIBUTES)))

    server = grpc.aio.server()
    pb_grpc.add_GradientServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.RpcError) as raised:
                await asyncio.wait_for(pb_grpc.GradientServiceStub(channel).GetModel(pb.GetModelRequest()), 20)
    finally:
        await server.stop(0)
    arrived = from_rpc_error(raised.value, command=True)
    assert type(arrived) is kind and arrived.attributes() == ATTRIBUTES


def test_every_error_has_a_status() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, GradwireError)}
    assert kinds == set(STATUS_OF)


def test_details_are_those_that_other_clients_read(service, stub) -> None:
    service[0].error = errors.InvalidArgument("expected 2, got 3", **ATTRIBUTES)
    with pytest.raises(grpc.RpcError) as raised:
        stub.GetModel(pb.GetModelRequest())
    status = rpc_status.from_call(raised.value)
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert status.message == 'tensors["fc.weight"]: expected 2, got 3'
    found = {}
    for kind in ("ErrorInfo", "BadRequest", "RetryInfo", "ResourceInfo"):
        message = getattr(error_details_pb2, kind)()
        assert sum(detail.Unpack(message) for detail in status.details if detail.Is(message.DESCRIPTOR)) == 1
        found[kind] = message
    assert (found["ErrorInfo"].domain, found["ErrorInfo"].reason) == ("gradwire", "SOME_REASON")
    assert found["BadRequest"].field_violations[0].field == 'tensors["fc.weight"]'
    assert found["RetryInfo"].retry_delay.ToMilliseconds() == 1500
    assert found["ResourceInfo"].resource_name == "models/digits"


@pytest.mark.parametrize(
    ("resource", "kind"),
    [
        ("models/digits", "Model"),
        ("models/digits/commands/5f8d1c1e-5c9c-4d0e-9a53-6b1f2c3d4e5f", "Command"),
        ("checkpoints/best", "Checkpoint"),
        ("models/digits/checkpoints/7", "Checkpoint"),
    ],
)
def test_resource_of_an_error_is_named_with_its_type(resource: str, kind: str) -> None:
    status = to_status(errors.AlreadyExists("taken", resource=resource))
    info = error_details_pb2.ResourceInfo()
    assert any(detail.Unpack(info) for detail in status.details if detail.Is(info.DESCRIPTOR))
    assert (info.resource_type, info.resource_name) == (f"gradwire.dev/{kind}", resource)


@pytest.mark.parametrize("letter", ["a", "数", "\ud800"])
def test_endless_message_and_field_still_arrive(service, stub, letter: str) -> None:
    service[0].error = errors.InvalidArgument(
        letter * 100_000, reason="LONG", field="f" * 100_000, resource=letter * 9999
    )
    arrived = caught(lambda: stub.GetModel(pb.GetModelRequest()))
    assert (type(arrived), arrived.reason) == (errors.InvalidArgument, "LONG")
    assert arrived.field is not None and arrived.field.startswith("fff") and len(str(arrived)) > 200


def test_error_class_that_a_newer_service_raises_is_read_by_its_code(service, stub) -> None:
    class QuotaGone(errors.ResourceExhausted):
        """An error that this version does not know."""

    service[0].error = QuotaGone("none left", reason="QUOTA_GONE")
    arrived = caught(lambda: stub.GetModel(pb.GetModelRequest()))
    assert (type(arrived), arrived.reason) == (errors.ResourceExhausted, "QUOTA_GONE")


def test_request_id_of_the_call_is_kept_where_the_answer_names_none(service, stub) -> None:
    service[0].error = errors.ModelNotFound("there is no model")
    assert caught(lambda: stub.GetModel(pb.GetModelRequest()), request_id="mine").request_id == "mine"
    service[0].error = errors.ModelNotFound("there is no model", request_id="theirs")
    assert caught(lambda: stub.GetModel(pb.GetModelRequest()), request_id="mine").request_id == "theirs"


@pytest.mark.parametrize("command", [False, True])
def test_server_that_is_not_there_is_unavailable_and_applied_nothing(command: bool) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{free.getsockname()[1]}"
    with grpc.insecure_channel(target) as channel:
        call = pb_grpc.GradientServiceStub(channel).TrainStep
        error = caught(lambda: call(pb.TrainStepRequest(), timeout=10), command=command)
    assert type(error) is errors.Unavailable
    assert (error.reason, error.retryable, error.outcome) == ("CONNECTION_FAILED", True, "not_applied")


@pytest.mark.parametrize(("command", "outcome"), [(False, "not_applied"), (True, "unknown")])
def test_deadline_leaves_a_commands_outcome_unknown(stub, command: bool, outcome: str) -> None:
    error = caught(lambda: stub.DeleteModel(pb.DeleteModelRequest(), timeout=0.1), command=command)
    assert type(error) is errors.DeadlineExceeded and error.outcome == outcome
    assert ("repeating its request id" in str(error)) is command


def test_connection_that_breaks_leaves_a_commands_outcome_unknown(service, stub) -> None:
    waiting = stub.DeleteModel.future(pb.DeleteModelRequest())
    with pytest.raises(grpc.FutureTimeoutError):
        waiting.result(timeout=0.3)
    service[2].stop(0)
    error = caught(waiting.result)
    assert type(error) is errors.Unavailable
    assert (error.reason, error.outcome) == ("CONNECTION_LOST", "unknown")


def test_caller_that_gives_up_leaves_a_commands_outcome_unknown(stub) -> None:
    waiting = stub.DeleteModel.future(pb.DeleteModelRequest())
    waiting.cancel()
    # A cancelled future raises an error of its own; the call itself is the RpcError.
    error = from_rpc_error(waiting, command=True)
    assert type(error) is errors.Cancelled and error.outcome == "unknown"


def test_message_too_large_names_the_setting_and_what_became_of_the_command(service, stub) -> None:
    error = caught(lambda: stub.TrainStep(pb.TrainStepRequest(name="x" * (5 << 20))))
    assert (type(error), error.reason) == (errors.ResourceExhausted, "MESSAGE_TOO_LARGE")
    assert error.outcome == "not_applied" and "message_bytes" in str(error)
    # The answer was too large: the command itself may well have been applied.
    error = caught(lambda: stub.GetServerInfo(pb.GetServerInfoRequest()))
    assert (error.reason, error.outcome) == ("MESSAGE_TOO_LARGE", "unknown")
    with grpc.insecure_channel(service[1], options=[("grpc.max_send_message_length", 1000)]) as channel:
        call = pb_grpc.GradientServiceStub(channel).TrainStep
        error = caught(lambda: call(pb.TrainStepRequest(name="x" * 2000)))
    assert (error.reason, error.outcome) == ("MESSAGE_TOO_LARGE", "not_applied")


def test_defect_and_unknown_call_of_another_server_are_errors_of_ours(stub) -> None:
    error = caught(lambda: stub.TrainStep(pb.TrainStepRequest()))
    assert type(error) is GradwireError and error.outcome == "unknown" and "a defect" in str(error)
    error = caught(lambda: stub.ZeroGrad(pb.ZeroGradRequest()))
    assert type(error) is errors.Unimplemented and error.outcome == "not_applied"


def test_long_error_is_cut_and_says_so() -> None:
    message = to_status(errors.InternalError("x" * 5000)).message
    assert len(message.encode()) <= 1000 and message.endswith("…")
