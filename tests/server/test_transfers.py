"""Uploads and downloads: any size, cut anywhere, bounded, and gone when they were used."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gradwire_proto import codec
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import Batch, ForwardResult, GradientResult, Handle, Segment, TensorData

W = b"\0\0\0\0\0\0\x40\x40"


def load(name: str, index: int = 0, shape: tuple[int, ...] = (1, 2), request_id: str = "") -> pb.LoadStateDictRequest:
    request = pb.LoadStateDictRequest(name="models/m", request_id=request_id)
    codec.encode_named_tensors({"w": TensorData("float32", shape, Handle(f"{name}/tensors/{index}"))}, request.tensors)
    return request


def state_dict(max_inline_bytes: int) -> pb.GetStateDictRequest:
    return pb.GetStateDictRequest(name="models/m", max_inline_bytes=max_inline_bytes)


@pytest.mark.parametrize("cut", [1, 3, 8, 1 << 20])
async def test_upload_round_trips_however_it_is_cut(frontend: Any, cut: int) -> None:
    workers = await frontend.create()
    tensors = [
        TensorData("uint8", (3,), b"abc"),
        TensorData("float32", (0, 2), b""),
        TensorData("float32", (1, 2), W),
        TensorData("bool", (5,), b"\1\0\1\0\1"),
    ]
    content = b"".join(bytes(tensor.data) for tensor in tensors)
    chunks = [content[start : start + cut] for start in range(0, len(content), cut)]
    name = await frontend.upload(*tensors, chunks=chunks)
    assert name.startswith("uploads/") and len(frontend.files) == 1
    assert (await frontend.stub.LoadStateDict(load(name, index=2))).step == 0
    assert bytes(workers.weights.data) == W


@pytest.mark.parametrize(
    ("count", "words"), [(65_537, "at most 65536 tensors, got 65537"), (2 << 20, "at most 2097152")]
)
async def test_upload_of_too_many_tensors_is_refused_before_they_are_looked_at(
    frontend: Any, count: int, words: str
) -> None:
    raw = b"\x0a\x00" * count  # A tensor of which nothing is said takes two bytes.
    manifest = pb.UploadManifest.FromString(raw)
    assert len(manifest.tensors) == count

    async def messages() -> Any:
        yield pb.UploadTensorsRequest(manifest=manifest)

    begin = time.process_time()
    error = await frontend.error(frontend.stub.UploadTensors(messages()))
    assert (error.reason, error.field) in [
        ("MANIFEST_TOO_LARGE", "manifest.tensors"),
        ("MANIFEST_TOO_LARGE", "manifest"),
    ]
    assert words in str(error)
    assert time.process_time() - begin < 1.0


async def test_upload_has_the_name_that_the_client_chose_and_a_repeat_is_answered_at_once(
    frontend: Any, fakes: Any
) -> None:
    workers = await frontend.create()
    upload_id = fakes.request_id()
    tensor = TensorData("float32", (1, 2), W)
    name = await frontend.upload(tensor, upload_id=upload_id.upper())
    assert name == f"uploads/{upload_id}"
    # No bytes: they are not asked for.
    assert await frontend.upload(tensor, chunks=[], upload_id=upload_id) == name
    assert len(frontend.files) == 1
    await frontend.stub.LoadStateDict(load(name))
    assert bytes(workers.weights.data) == W and not frontend.files


async def test_upload_that_comes_twice_at_once_is_held_once(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    upload_id = fakes.request_id()
    tensor = TensorData("float32", (1, 2), W)
    twice = [frontend.upload(tensor, chunks=[W[:4], W[4:]], pause=0.05, upload_id=upload_id) for _ in range(2)]
    first, second = await asyncio.gather(*twice)
    assert first == second and len(frontend.files) == 1
    await frontend.stub.LoadStateDict(load(first))
    assert not frontend.files


async def test_upload_that_was_cut_off_starts_again_under_its_name(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    upload_id = fakes.request_id()
    tensor = TensorData("float32", (1, 2), W)
    assert (await frontend.error(frontend.upload(tensor, chunks=[W[:4]], upload_id=upload_id))).field
    assert not frontend.files
    assert await frontend.upload(tensor, upload_id=upload_id) == f"uploads/{upload_id}"


async def test_upload_id_that_names_other_tensors_is_refused(frontend: Any, fakes: Any) -> None:
    await frontend.create()
    upload_id = fakes.request_id()
    await frontend.upload(TensorData("float32", (1, 2), W), upload_id=upload_id)
    error = await frontend.error(frontend.upload(TensorData("float32", (2, 1), W), upload_id=upload_id))
    assert (error.reason, error.field) == ("UPLOAD_ID_REUSED", "manifest.upload_id")
    error = await frontend.error(frontend.upload(TensorData("float32", (1, 2), W), upload_id="mine"))
    assert (error.reason, error.field) == ("UPLOAD_ID_INVALID", "manifest.upload_id")


async def test_large_state_dict_goes_up_and_comes_down(frontend: Any) -> None:
    await frontend.create()
    content = os.urandom((5 << 20) + 12)
    rows = len(content) // 4
    chunks = [content[start : start + (1 << 20)] for start in range(0, len(content), 1 << 20)]
    name = await frontend.upload(TensorData("float32", (rows,), content), chunks=chunks)
    frontend.cluster.groups["m"].result = None
    request = load(name, shape=(rows,))
    await frontend.stub.LoadStateDict(request)
    assert frontend.cluster.groups["m"].weights.data == content and not frontend.files


async def test_optimizer_state_goes_up_and_comes_down_by_handle_and_a_repeat_is_answered_once(
    frontend: Any, fakes: Any
) -> None:
    workers = await frontend.create()
    name = await frontend.upload(TensorData("float32", (1, 2), W))
    request = pb.LoadOptimizerStateRequest(name="models/m", request_id=fakes.request_id())
    uploaded = TensorData("float32", (1, 2), Handle(f"{name}/tensors/0"))
    codec.encode_value({"state": {"w": {"momentum_buffer": uploaded}}}, request.state)
    for _ in range(2):
        assert (await frontend.stub.LoadOptimizerState(request)).step == 0
    assert workers.calls == [("load_optimizer_state", W)] and not frontend.files
    reply = await frontend.stub.GetOptimizerState(pb.GetOptimizerStateRequest(name="models/m", max_inline_bytes=1))
    state = codec.decode_optimizer_state(reply)
    handle = state["state"]["w"]["momentum_buffer"].data.name
    assert await frontend.download(handle.partition("/tensors/")[0]) == fakes.read(workers.weights)
    assert (state["optimizer"], state["schedule"]) == ("SGD", None)


async def test_uploaded_tensor_is_used_by_one_request(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    name = await frontend.upload(TensorData("float32", (1, 2), W), TensorData("uint8", (1,), b"x"))
    request = load(name, request_id=fakes.request_id())
    await frontend.stub.LoadStateDict(request)
    assert len(frontend.files) == 1, "the second tensor still waits"
    await frontend.stub.LoadStateDict(request)
    assert len(workers.calls) == 1, "a repeat needs no tensors"
    error = await frontend.error(frontend.stub.LoadStateDict(load(name)))
    assert (error.reason, error.outcome) == ("UPLOAD_NOT_FOUND", "not_applied") and error.field == "tensors.w"


async def test_handles_in_a_batch_are_resolved(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    name = await frontend.upload(TensorData("float32", (1, 2), W))
    request = frontend.train()
    request.batch.inputs.tensor.handle = f"{name}/tensors/0"
    await frontend.stub.TrainStep(request)
    assert workers.calls[-1][1] == W and not frontend.files
    nested = pb.TrainStepRequest(name="models/m")
    inputs = {"x": (fakes.two_floats(), [TensorData("float32", (1, 2), Handle(f"{name}/tensors/0"))])}
    codec.encode_batch(Batch(inputs), nested.batch)
    error = await frontend.error(frontend.stub.TrainStep(nested))
    assert (error.reason, error.field) == ("UPLOAD_NOT_FOUND", "batch.inputs.x[1][0]")


async def test_upload_of_another_type_is_refused_and_stays(frontend: Any) -> None:
    await frontend.create()
    name = await frontend.upload(TensorData("float32", (2, 1), W))
    error = await frontend.error(frontend.stub.LoadStateDict(load(name)))
    assert error.reason == "UPLOAD_TYPE_MISMATCH" and "float32[2, 1]" in error.message
    await frontend.stub.LoadStateDict(load(name, shape=(2, 1)))


async def test_handles_of_a_request_that_never_ran_stay_good(frontend: Any) -> None:
    workers = await frontend.create()
    name = await frontend.upload(TensorData("float32", (1, 2), W))
    workers.gate.clear()
    running = asyncio.ensure_future(frontend.stub.TrainStep(frontend.train()))
    await frontend.until(lambda: workers.busy)
    error = await frontend.error(frontend.stub.LoadStateDict(load(name), timeout=0.1))
    assert error.reason == "DEADLINE_EXCEEDED"
    await asyncio.sleep(0.1)
    workers.gate.set()
    await running
    await frontend.stub.LoadStateDict(load(name))
    assert bytes(workers.weights.data) == W


@pytest.mark.parametrize(
    ("chunks", "reason"),
    [([b"1234567"], "UPLOAD_TOO_SHORT"), ([b"12345678", b"9"], "UPLOAD_TOO_LONG"), ([], "UPLOAD_TOO_SHORT")],
)
async def test_lies_about_sizes_are_refused(frontend: Any, chunks: list[bytes], reason: str) -> None:
    error = await frontend.error(frontend.upload(TensorData("float32", (1, 2), W), chunks=chunks))
    assert error.reason == reason and error.field == "chunk"
    assert not frontend.files and (await frontend.upload(TensorData("uint8", (1,), b"x")))


async def test_manifests_are_checked(frontend: Any, fakes: Any) -> None:
    async def messages(*manifests: Any) -> Any:
        for manifest in manifests:
            yield manifest

    def header(**parts: Any) -> Any:
        return pb.UploadTensorsRequest(manifest=pb.UploadManifest(tensors=[pb.UploadHeader(**parts)]))

    async def refused(*sent: Any) -> tuple[str, str | None]:
        error = await frontend.error(frontend.stub.UploadTensors(messages(*sent)))
        return error.reason, error.field

    assert await refused() == ("MANIFEST_MISSING", "manifest")
    assert await refused(pb.UploadTensorsRequest(chunk=b"x")) == ("MANIFEST_MISSING", "manifest")
    good = header(dtype=2, shape=[2])
    assert await refused(good, good) == ("CHUNK_MISSING", "chunk")
    assert await refused(header(dtype=2, shape=[-1])) == ("SHAPE_INVALID", "manifest.tensors[0].shape")
    assert (await refused(header(dtype=99, shape=[1])))[1] == "manifest.tensors[0].dtype"
    assert (await refused(header(dtype=1, shape=[1 << 40])))[0] == "TENSOR_TOO_LARGE"
    not_bool = TensorData("bool", (2,), b"\1\2")
    assert (await frontend.error(frontend.upload(not_bool, chunks=[b"\1\2"]))).reason == "TENSOR_NOT_BOOL"
    assert not frontend.files


async def test_cut_off_upload_is_reclaimed(start: Any) -> None:
    async with start(held_bytes=100) as frontend:
        tensor = TensorData("uint8", (90,), b"x" * 90)
        call = asyncio.ensure_future(frontend.upload(tensor, chunks=[b"x" * 45] * 2, pause=5))
        await frontend.until(lambda: frontend.files)
        call.cancel()
        await frontend.until(lambda: not frontend.files)
        await frontend.upload(tensor)


async def test_upload_that_stands_still_gives_its_room_back_while_its_connection_lives(start: Any) -> None:
    async with start(held_bytes=100, stall_seconds=0.3) as frontend:
        tensor = TensorData("uint8", (90,), b"x" * 90)
        stalled = asyncio.ensure_future(frontend.upload(tensor, chunks=[b"x" * 45] * 2, pause=30))
        await frontend.until(lambda: frontend.files)
        error = await frontend.error(stalled)
        assert error.reason == "STREAM_STALLED" and "stall_seconds" in error.message
        assert not frontend.files
        await frontend.upload(tensor, chunks=[b"x" * 15] * 6, pause=0.1)  # Slow, and never still.


async def test_download_that_nobody_reads_expires_while_its_connection_lives(start: Any) -> None:
    async with start(stall_seconds=0.3, held_seconds=0.5) as frontend:
        workers = await frontend.create()
        workers.weights = TensorData("uint8", (64 << 20,), memoryview(bytes(64 << 20)))
        reply = await frontend.stub.GetStateDict(state_dict(1))
        download = reply.tensors[0].tensor.handle.partition("/tensors/")[0]
        call = frontend.stub.DownloadTensors(pb.DownloadTensorsRequest(name=download))
        assert await call.read()
        await frontend.until(lambda: not frontend.files)
        call.cancel()


async def test_held_bytes_is_a_limit_with_a_name(start: Any) -> None:
    async with start(held_bytes=100) as frontend:
        await frontend.create()
        await frontend.upload(TensorData("uint8", (90,), b"x" * 90))
        error = await frontend.error(frontend.upload(TensorData("uint8", (11,), b"x" * 11)))
        assert error.reason == "HELD_BYTES_EXHAUSTED" and "held_bytes" in error.message
        assert error.retryable and error.retry_after
        error = await frontend.error(frontend.upload(TensorData("uint8", (101,), b"x" * 101)))
        assert error.reason == "HELD_BYTES_EXHAUSTED" and not error.retryable
        frontend.cluster.groups["m"].weights = TensorData("uint8", (11,), b"x" * 11)
        assert (await frontend.error(frontend.stub.GetStateDict(state_dict(4)))).reason == "HELD_BYTES_EXHAUSTED"
        assert len(frontend.files) == 1


async def test_unused_uploads_and_downloads_expire(start: Any) -> None:
    async with start(held_seconds=0.2, held_bytes=16) as frontend:
        await frontend.create()
        name = await frontend.upload(TensorData("float32", (1, 2), W))
        reply = await frontend.stub.GetStateDict(state_dict(1))
        assert len(frontend.files) == 2
        await frontend.until(lambda: not frontend.files)
        error = await frontend.error(frontend.stub.LoadStateDict(load(name)))
        assert error.reason == "UPLOAD_NOT_FOUND" and "held_seconds" in error.message
        download = reply.tensors[0].tensor.handle.partition("/tensors/")[0]
        assert (await frontend.error(frontend.download(download))).reason == "DOWNLOAD_NOT_FOUND"
        await frontend.upload(TensorData("uint8", (16,), b"x" * 16))


async def test_upload_in_use_does_not_expire(start: Any) -> None:
    async with start(held_seconds=0.1) as frontend:
        workers = await frontend.create()
        name = await frontend.upload(TensorData("float32", (1, 2), W))
        workers.gate.clear()
        call = asyncio.ensure_future(frontend.stub.LoadStateDict(load(name)))
        await frontend.until(lambda: workers.busy)
        await asyncio.sleep(0.3)
        assert len(frontend.files) == 1
        workers.gate.set()
        await call
        assert bytes(workers.weights.data) == W and not frontend.files


def segment_file(folder: Path, content: bytes) -> str:
    """A file such as ranks write."""
    path = folder.parent / "rank-1"
    path.write_bytes(content)
    return str(path)


async def test_large_results_come_by_download_and_leave_no_file(frontend: Any) -> None:
    workers = await frontend.create()
    content = os.urandom(3 << 20)
    path = segment_file(frontend.folder, content)
    tensors = {
        "b": TensorData("uint8", (1 << 20,), Segment(path, 2 << 20, 1 << 20)),
        "small": TensorData("uint8", (3,), memoryview(b"abc")),
        "a": TensorData("uint8", (2 << 20,), Segment(path, 0, 2 << 20)),
        "tied": TensorData("uint8", (1 << 20,), Segment(path, 2 << 20, 1 << 20)),
        "empty": TensorData("float32", (0, 2), b""),
    }
    workers.result = tensors
    reply = await frontend.stub.GetStateDict(state_dict(1 << 20))
    assert [tensor.name for tensor in reply.tensors] == list(tensors)
    handles = [tensor.tensor.handle for tensor in reply.tensors]
    (download,) = {handle.partition("/tensors/")[0] for handle in handles}
    assert [int(handle.rpartition("/")[2]) for handle in handles] == [0, 1, 2, 3, 4]
    fetched = await frontend.download(download)
    assert fetched == content[2 << 20 :] + b"abc" + content[: 2 << 20] + content[2 << 20 :]
    assert not Path(path).exists() and not frontend.files
    assert (await frontend.error(frontend.download(download))).reason == "DOWNLOAD_NOT_FOUND"


async def test_results_come_inline_where_nothing_else_is_asked_for(frontend: Any) -> None:
    workers = await frontend.create()
    path = segment_file(frontend.folder, b"0123456789")
    segment = TensorData("uint8", (4,), Segment(path, 3, 4))
    workers.result = GradientResult(
        loss=1.0, step=0, num_examples=1, gradients={"w": segment}, input_gradients=(None, segment), outputs={"y": 2.5}
    )
    request = pb.ComputeGradientsRequest(name="models/m")
    codec.encode_batch(Batch(segment_inputs()), request.batch)
    reply = codec.decode_gradient_result(await frontend.stub.ComputeGradients(request))
    inline = TensorData("uint8", (4,), b"3456")
    assert (reply.gradients, reply.input_gradients, reply.outputs) == ({"w": inline}, (None, inline), {"y": 2.5})
    assert not Path(path).exists()


def segment_inputs() -> TensorData:
    return TensorData("float32", (1, 2), W)


async def test_reply_above_message_bytes_names_the_setting_and_leaves_no_file(start: Any) -> None:
    async with start(message_bytes=1 << 16) as frontend:
        workers = await frontend.create()
        path = segment_file(frontend.folder, b"x" * (1 << 16))
        workers.result = {"w": TensorData("uint8", (1 << 16,), Segment(path, 0, 1 << 16))}
        error = await frontend.error(frontend.stub.GetStateDict(state_dict(0)))
        assert (error.reason, error.field) == ("REPLY_TOO_LARGE", "max_inline_bytes")
        assert "message_bytes" in error.message and not Path(path).exists()


async def test_training_forward_whose_reply_is_too_large_was_applied(start: Any, fakes: Any) -> None:
    async with start(message_bytes=1 << 16) as frontend:
        workers = await frontend.create()
        workers.result = ForwardResult(outputs=TensorData("uint8", (1 << 16,), memoryview(b"x" * (1 << 16))), step=0)
        request = pb.ForwardRequest(name="models/m", training=True, request_id=fakes.request_id())
        codec.encode_value(segment_inputs(), request.inputs)
        error = await frontend.error(frontend.stub.Forward(request))
        assert (error.reason, error.outcome) == ("REPLY_TOO_LARGE", "applied")
        await frontend.error(frontend.stub.Forward(request))
        assert len(workers.calls) == 1


async def test_broken_download_can_be_repeated(frontend: Any) -> None:
    workers = await frontend.create()
    content = os.urandom(8 << 20)
    workers.weights = TensorData("uint8", (8 << 20,), memoryview(content))
    reply = await frontend.stub.GetStateDict(state_dict(1))
    download = reply.tensors[0].tensor.handle.partition("/tensors/")[0]
    call = frontend.stub.DownloadTensors(pb.DownloadTensorsRequest(name=download))
    assert await call.read()
    call.cancel()
    assert await frontend.download(download) == content
    assert not frontend.files


async def test_forward_reads_in_eval_mode_and_is_a_command_in_training_mode(frontend: Any, fakes: Any) -> None:
    workers = await frontend.create()
    request = pb.ForwardRequest(name="models/m", seed=3)
    codec.encode_value(segment_inputs(), request.inputs)
    reply = codec.decode_forward_result(await frontend.stub.Forward(request))
    assert reply.outputs == segment_inputs()
    request.request_id = fakes.request_id()
    error = await frontend.error(frontend.stub.Forward(request))
    assert (error.reason, error.field) == ("REQUEST_ID_NOT_TAKEN", "request_id")
    request.training = True
    assert await frontend.stub.Forward(request) == await frontend.stub.Forward(request)
    assert [call[1:] for call in workers.calls] == [(False, 3, 0), (True, 3, 1)]


async def test_optimizer_step_takes_the_clients_gradients_or_the_held_ones(frontend: Any) -> None:
    workers = await frontend.create()
    request = pb.OptimizerStepRequest(name="models/m")
    await frontend.stub.OptimizerStep(request)
    codec.encode_named_tensors({"w": segment_inputs()}, request.gradients)
    await frontend.stub.OptimizerStep(request)
    assert [call[1] for call in workers.calls] == [None, {"w": W}]
