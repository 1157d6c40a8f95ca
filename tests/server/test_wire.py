"""What any client meets before its request means anything: malformed bytes, limits of messages, health, reflection."""

from __future__ import annotations

import asyncio
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from operator import attrgetter
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradwire_proto import codec
from gradwire_proto.errors import Unavailable
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2
from gradwire_proto.values import TensorData

METHODS_BY_NAME = pb.DESCRIPTOR.services_by_name["GradientService"].methods_by_name
METHODS = pb.DESCRIPTOR.services_by_name["GradientService"].methods
UNARY = sorted(method.name for method in METHODS if not method.client_streaming and not method.server_streaming)
UNKNOWN_FIELD = b"\xfa\x3f\x03abc"  # Field number 1023, three bytes.


def raw_call(frontend: Any, method: str, content: bytes) -> Any:
    path = f"/gradwire.v1.GradientService/{method}"
    if method == "UploadTensors":
        return frontend.channel.stream_unary(path)(iter([content]))
    return frontend.channel.unary_unary(path)(content)


async def code_of(call: Any) -> grpc.StatusCode:
    with suppress(grpc.aio.AioRpcError):
        await call
    return await call.code()


DEFECTS = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.mark.parametrize("method", UNARY)
async def test_malformed_bytes_are_a_typed_error(frontend: Any, method: str) -> None:
    await frontend.create()
    error = await frontend.error(raw_call(frontend, method, b"\xff\xff\xff"))
    assert (type(error).__name__, error.reason) == ("InvalidArgument", "MALFORMED_MESSAGE")


@pytest.mark.parametrize("method", UNARY)
async def test_empty_and_random_requests_are_answered(frontend: Any, method: str) -> None:
    for content in (b"", *(os.urandom(size) for size in (1, 2, 3, 8, 40))):
        assert await code_of(raw_call(frontend, method, content)) not in DEFECTS


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_requests_never_meet_a_defect(start: Any, data: st.DataObject) -> None:
    async def run() -> None:
        async with start(place=str(uuid.uuid4())) as frontend:
            await frontend.create()
            content = bytearray(
                data.draw(st.sampled_from([frontend.train(), frontend.creation("n")])).SerializeToString()
            )
            for _ in range(data.draw(st.integers(1, 4))):
                content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
            method = data.draw(st.sampled_from(["TrainStep", "CreateModel"]))
            assert await code_of(raw_call(frontend, method, bytes(content))) not in DEFECTS

    asyncio.run(run())


async def test_unknown_fields_are_refused(frontend: Any) -> None:
    error = await frontend.error(raw_call(frontend, "GetServerInfo", b"\xa8\x1f\x01"))
    assert error.reason == "UNKNOWN_FIELD"


def nested_places(descriptor: Descriptor) -> Iterator[tuple[FieldDescriptor, ...]]:
    """A way from a request to each field that holds messages, however deep: every such field once."""
    seen: set[str] = set()
    ways: list[tuple[tuple[FieldDescriptor, ...], Descriptor]] = [((), descriptor)]
    while ways:
        way, reached = ways.pop(0)
        for field in reached.fields:
            nested = field.message_type
            # Protobuf drops the unknown fields of a map's entries when it parses.
            if nested is not None and not nested.GetOptions().map_entry and field.full_name not in seen:
                seen.add(field.full_name)
                yield (*way, field)
                ways.append(((*way, field), nested))


PLACES = [
    pytest.param(method, way, id=f"{method.name}-{'.'.join(field.name for field in way)}")
    for method in METHODS
    # Its messages hold those of TrainStep, and each is answered by itself: test_train_steps.py.
    if method.name != "TrainSteps"
    for way in nested_places(method.input_type)
]


@pytest.mark.parametrize(("method", "way"), PLACES)
async def test_every_message_in_a_request_refuses_unknown_fields(
    frontend: Any, method: MethodDescriptor, way: tuple[FieldDescriptor, ...]
) -> None:
    request = GetMessageClass(method.input_type)()
    message, path = request, ""
    for field in way:
        message, path = getattr(message, field.name), f"{path}.{field.name}".removeprefix(".")
        if not field.has_presence:
            message, path = message.add(), f"{path}[0]"
    message.MergeFromString(UNKNOWN_FIELD)
    error = await frontend.error(raw_call(frontend, method.name, request.SerializeToString()))
    assert (type(error).__name__, error.reason, error.field) == ("InvalidArgument", "UNKNOWN_FIELD", path)
    assert f"{message.DESCRIPTOR.name} has no field number 1023" in error.message


def test_places_of_messages_in_requests_are_all_found() -> None:
    ways = {test.id for test in PLACES}
    assert {
        "TrainStep-batch",
        "TrainStep-batch.targets",
        "TrainStep-batch.inputs.tensor",
        "Forward-inputs.dict.entries.value",
        "OptimizerStep-gradients.tensor",
        "UploadTensors-manifest.tensors",
        "AddVariant-variant.graph.nodes.arguments",
        "ComputeGradients-function.tensors",
    } <= ways


@pytest.mark.parametrize("place", ["batch", "batch.inputs", "batch.inputs.tensor"])
async def test_training_step_with_an_unknown_field_in_its_batch_is_no_step(frontend: Any, place: str) -> None:
    workers = await frontend.create()
    request = frontend.train()
    attrgetter(place)(request).MergeFromString(UNKNOWN_FIELD)
    error = await frontend.error(frontend.stub.TrainStep(request))
    assert (type(error).__name__, error.reason, error.field) == ("InvalidArgument", "UNKNOWN_FIELD", place)
    assert workers.calls == []


async def test_message_above_message_bytes_names_the_setting(start: Any) -> None:
    async with start(message_bytes=1 << 16) as frontend:
        await frontend.create()
        request = frontend.train()
        codec.encode_tensor(TensorData("uint8", (1 << 16,), b"x" * (1 << 16)), request.batch.inputs.tensor)
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert error.reason == "MESSAGE_TOO_LARGE" and "message_bytes" in error.message
        codec.encode_tensor(TensorData("uint8", (1 << 18,), b"x" * (1 << 18)), request.batch.inputs.tensor)
        error = await frontend.error(frontend.stub.TrainStep(request))
        assert error.reason == "MESSAGE_TOO_LARGE" and "message_bytes" in error.message


@pytest.mark.parametrize("method", ["TrainStep", "CreateDataset", "ComputeGradients"])
async def test_request_of_too_many_parts_is_refused_before_they_are_looked_at(frontend: Any, method: str) -> None:
    await frontend.create()
    # A list of 1.5 million booleans, in 6 MiB: half a minute to decode.
    items = b"\x0a\x02\x28\x01" * 1_500_000
    values = tensor_pb2.Value()
    values.list.ParseFromString(items)
    request = GetMessageClass(METHODS_BY_NAME[method].input_type)(batch=tensor_pb2.Batch(inputs=values))
    assert len(request.batch.inputs.list.items) == 1_500_000
    raw, begin = request.SerializeToString(), time.thread_time()
    error = await frontend.error(raw_call(frontend, method, raw))
    assert error.reason == "MESSAGE_TOO_LARGE" and "131072 parts" in str(error)
    assert time.thread_time() - begin < 1.0
    assert not frontend.cluster.groups["m"].calls


async def test_state_dict_of_tens_of_thousands_of_tensors_has_not_too_many_parts() -> None:
    request = pb.LoadStateDictRequest(name="models/m")
    codec.encode_named_tensors(
        {f"block.{index}.weight": TensorData("float32", (1,), b"abcd") for index in range(40_000)}, request.tensors
    )
    codec.refuse_many_parts(request)


async def test_large_message_is_taken_and_its_repeat_known(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = frontend.train(request_id=fakes.request_id())
    request.batch.inputs.tensor.ClearField("shape")
    codec.encode_tensor(TensorData("uint8", (3 << 20,), b"x" * (3 << 20)), request.batch.inputs.tensor)
    await frontend.stub.TrainStep(request)
    await frontend.stub.TrainStep(request)
    assert len(workers.calls) == 1


async def test_server_info_tells_versions_capacity_and_limits(start: Any) -> None:
    async with start(models=3) as frontend:
        info = codec.decode_server_info(await frontend.stub.GetServerInfo(pb.GetServerInfoRequest()))
        assert (info.workers, info.free_workers, info.limits.models) == (2, 1, 3)
        assert info.torch_version.startswith("2.") and info.version


async def test_health_tells_the_whole_and_the_service(frontend: Any) -> None:
    health = health_pb2_grpc.HealthStub(frontend.channel)
    for name in ("", "gradwire.v1.GradientService"):
        reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_describes_every_method(frontend: Any) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(frontend.channel)

    async def ask(**parts: Any) -> Any:
        request = reflection_pb2.ServerReflectionRequest(**parts)
        return await stub.ServerReflectionInfo(iter([request])).read()

    names = [service.name for service in (await ask(list_services="")).list_services_response.service]
    assert {"gradwire.v1.GradientService", "grpc.health.v1.Health"} <= set(names)
    found = await ask(file_containing_symbol="gradwire.v1.GradientService")
    file = FileDescriptorProto.FromString(found.file_descriptor_response.file_descriptor_proto[0])
    assert "TrainStep" in [method.name for method in file.service[0].method]


async def test_taken_port_is_an_error(start: Any) -> None:
    async with start() as first:
        with pytest.raises(Unavailable) as caught:
            async with start(listen=first.target, place="other"):
                pass
        assert caught.value.reason == "ADDRESS_IN_USE"
