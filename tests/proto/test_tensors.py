"""torch and numpy tensors travel bit for bit, and share memory where they may."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from gradwire_proto import codec, tensors, values
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import tensor_pb2


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Random bits: NaN of every kind, infinities and subnormals among them; bool is 0 or 1."""
    if dtype is torch.bool:
        return torch.rand(shape) > 0.5
    size = int(np.prod(shape)) * dtype.itemsize
    return (
        torch.randint(256, (size,), dtype=torch.uint8).view(dtype).view(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.detach()
        .resolve_conj()
        .clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


@pytest.mark.parametrize("dtype", values.ITEM_SIZE)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 5)])
@pytest.mark.parametrize("writable", [False, True])
def test_tensor_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...], writable: bool) -> None:
    tensor = random_tensor(tensors.torch_dtype(dtype), shape)
    wire = codec.encode_tensor(tensors.from_torch(tensor)).SerializeToString()
    back = tensors.to_torch(codec.decode_tensor(tensor_pb2.Tensor.FromString(wire)), writable=writable)
    assert back.dtype == tensor.dtype and back.shape == tensor.shape
    assert bits(back) == bits(tensor)


def test_item_sizes_are_those_of_torch() -> None:
    assert {name: tensors.torch_dtype(name).itemsize for name in values.ITEM_SIZE} == dict(values.ITEM_SIZE)
    assert all(tensors.dtype_name(tensors.torch_dtype(name)) == name for name in values.ITEM_SIZE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "complex64", "bool"])
def test_tensor_that_is_no_row_major_block_is_sent_as_one(dtype: str) -> None:
    tensor = random_tensor(tensors.torch_dtype(dtype), (4, 6))
    for view in (tensor.t(), tensor[:, ::2], tensor[1:, 3:], tensor[:1].expand(5, 6), tensor[1:2, ::2][:, :1]):
        assert bytes(tensors.from_torch(view).data) == bits(view)


def test_conjugate_and_negative_views_are_resolved() -> None:
    for count in (1, 3):  # The imaginary part of one number is contiguous, of three it is not.
        tensor = torch.randn(count, dtype=torch.complex64)
        conjugate = tensor.conj()
        assert conjugate.is_conj() and conjugate.imag.is_neg()
        assert torch.equal(tensors.to_torch(tensors.from_torch(conjugate)), torch.conj_physical(tensor))
        assert torch.equal(tensors.to_torch(tensors.from_torch(conjugate.imag)), -tensor.imag)


def test_contiguous_tensor_is_not_copied() -> None:
    tensor = torch.zeros(4, requires_grad=True)
    data = tensors.from_torch(tensor)
    view = tensors.to_torch(data)
    with torch.no_grad():
        tensor[1] = 7.0
    assert view.data_ptr() == tensor.data_ptr() and view[1] == 7.0


@pytest.mark.parametrize("count", [4, 1 << 20])
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: memoryview(bytearray(b"????" + data))[4:]])
def test_writable_tensor_has_memory_of_its_own(count: int, kind: type) -> None:
    data = kind(bytes(4 * count))
    tensor = tensors.to_torch(values.TensorData("float32", (count,), data), writable=True)
    tensor += 1
    assert bytes(data) == bytes(4 * count)


@pytest.mark.parametrize("count", [4, 1 << 20])
def test_read_only_memory_makes_no_warning_and_large_one_no_copy(count: int) -> None:
    data = bytes(4 * count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = tensors.to_torch(values.TensorData("float32", (count,), data))
    shared = tensor.data_ptr() == np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    assert shared is (count == 1 << 20)


def test_tensor_keeps_the_memory_that_it_shares() -> None:
    expected = torch.randn(1 << 18)
    tensor = tensors.to_torch(values.TensorData("float32", (1 << 18,), bits(expected)))
    _ = [bytearray(1 << 20) for _ in range(20)]
    assert torch.equal(tensor, expected)


def test_slice_that_is_not_aligned_is_copied_to_where_it_is() -> None:
    expected = torch.randn(100_000, dtype=torch.float64)
    for kind in (bytes, bytearray):
        data = memoryview(kind(b"x" + bits(expected)))[1:]
        tensor = tensors.to_torch(values.TensorData("float64", (100_000,), data))
        assert tensor.data_ptr() % 8 == 0 and torch.equal(tensor, expected)


EVERY_OFFSET = """
import torch
from gradwire_proto import values
from gradwire_proto.tensors import to_torch
from gradwire_proto.values import TensorData
for name, size in values.ITEM_SIZE.items():
    for count in (1, 3, 7, 129):
        raw = bytes(i % 2 for i in range(size * count))
        for offset in range(16):
            for kind in (bytes, bytearray):
                for writable in (False, True):
                    data = memoryview(kind(offset) + kind(raw) + kind(16))[offset : offset + len(raw)]
                    found = to_torch(TensorData(name, (count,), data), writable=writable)
                    assert found.data_ptr() % size == 0 and found.clone().view(torch.uint8).numpy().tobytes() == raw
"""


def test_elements_of_every_type_may_begin_at_every_address() -> None:
    # Apart, for a kernel that loads from where an element must not lie ends its process.
    subprocess.run([sys.executable, "-c", EVERY_OFFSET], check=True)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("offset", [0, 8, 4096, 5000])
def test_segment_is_read_from_its_file_and_never_written(tmp_path: Path, writable: bool, offset: int) -> None:
    expected = torch.randn(3, 100)
    path = tmp_path / "segment"
    path.write_bytes(bytes(offset) + bits(expected) + b"tail")
    data = values.TensorData("float32", (3, 100), values.Segment(str(path), offset, expected.nbytes))
    tensor = tensors.to_torch(data, writable=writable)
    path.chmod(0o400)
    assert torch.equal(tensor, expected)
    tensor += 1
    assert path.read_bytes()[offset:-4] == bits(expected)
    path.unlink()
    assert torch.equal(tensor, expected + 1)


def test_segment_without_bytes_is_an_empty_tensor(tmp_path: Path) -> None:
    data = values.TensorData("float32", (0, 2), values.Segment(str(tmp_path / "gone"), 0, 0))
    assert tensors.to_torch(data).shape == (0, 2)


@pytest.mark.parametrize("writable", [False, True])
def test_segment_shorter_than_its_tensor_is_refused(tmp_path: Path, writable: bool) -> None:
    path = tmp_path / "segment"
    path.write_bytes(bytes(4))
    data = values.TensorData("float32", (2,), values.Segment(str(path), 0, 4))
    with pytest.raises(InvalidArgument) as caught:
        tensors.to_torch(data, writable=writable)
    assert caught.value.reason == "TENSOR_SIZE_MISMATCH"


@pytest.mark.parametrize("writable", [False, True])
def test_bool_of_another_byte_is_refused(writable: bool) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tensors.to_torch(values.TensorData("bool", (2,), b"\x01\x02"), writable=writable)
    assert caught.value.reason == "TENSOR_NOT_BOOL"


def test_handle_is_no_tensor() -> None:
    with pytest.raises(TypeError, match="download"):
        tensors.to_torch(values.TensorData("float32", (1,), values.Handle("downloads/a/tensors/0")))


@pytest.mark.parametrize("name", sorted(set(values.ITEM_SIZE) - {"bfloat16"}))
@pytest.mark.parametrize("shape", [(), (0, 2), (2, 3)])
def test_numpy_array_is_taken_as_the_tensor_that_it_equals(name: str, shape: tuple[int, ...]) -> None:
    array = random_tensor(tensors.torch_dtype(name), shape).numpy()
    data = tensors.from_any(array)
    assert (data.dtype, data.shape, bytes(data.data)) == (name, shape, array.tobytes())


def test_numpy_byte_order_layout_and_scalars_are_evened_out() -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    for other in (array.astype(">f8"), np.asfortranarray(array)):
        assert torch.equal(tensors.to_torch(tensors.from_any(other)), torch.from_numpy(array))
    assert bytes(tensors.from_any(array[0, 1::2]).data) == array[0, 1:2].tobytes()
    assert tensors.from_any(np.int64(3)).shape == ()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.empty(2, device="meta"), "TENSOR_NOT_DENSE"),
        (torch.eye(2).to_sparse(), "TENSOR_NOT_DENSE"),
        (torch.zeros(2, dtype=torch.uint16), "DTYPE_UNSUPPORTED"),
        (np.zeros(2, np.uint32), "DTYPE_UNSUPPORTED"),
        (np.array(["a"]), "DTYPE_UNSUPPORTED"),
        ([1.0], "TENSOR_EXPECTED"),
    ],
)
def test_what_the_service_does_not_speak_is_refused_by_field(value: object, reason: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        tensors.from_any(value, "batch.inputs[0]")
    assert (caught.value.reason, caught.value.field) == (reason, "batch.inputs[0]")


def test_nested_values_keep_structure_and_constants() -> None:
    value = {"x": (torch.arange(3), [np.ones(2, np.float32), None]), "flag": True, "scale": 0.5, "mode": "a", "n": 2}
    back = tensors.to_nested(tensors.from_nested(value))
    assert back.keys() == value.keys()
    assert torch.equal(back["x"][0], torch.arange(3)) and torch.equal(back["x"][1][0], torch.ones(2))
    assert back["x"][1][1] is None
    assert (back["flag"], back["scale"], back["mode"], back["n"]) == (True, 0.5, "a", 2)


def test_nested_value_of_another_type_is_refused_by_its_path() -> None:
    with pytest.raises(InvalidArgument) as caught:
        tensors.from_nested(({"x": {1, 2}},), "batch.inputs")
    assert caught.value.field == "batch.inputs[0].x"
