"""Files of tensors: what the library reads, and what is refused."""

from __future__ import annotations

import io
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from server.storage.checkpoint_cases import DTYPES, plain

from gradwire_proto.errors import InternalError
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import ITEM_SIZE, Segment, TensorData
from gradwire_server.storage.tensor_files import ALIGNMENT, read_tensors, write_tensors
from gradwire_workers.segments import SegmentWriter


def write(path: Path, tensors: dict[str, TensorData]) -> None:
    with open(path, "wb") as file:
        write_tensors(file, tensors)


def written(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    write(path, {name: from_torch(tensor) for name, tensor in tensors.items()})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.safetensors"


def test_library_reads_every_type_as_it_was(path):
    tensors = {dtype: torch.arange(7).to(getattr(torch, dtype)).reshape(7, 1) for dtype in DTYPES}
    found = load_file(written(path, tensors))
    assert found.keys() == tensors.keys()
    assert all(found[name].dtype is each.dtype and torch.equal(found[name], each) for name, each in tensors.items())


def test_library_reads_scalars_tensors_without_elements_and_names_of_all_scripts(path):
    tensors = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "größe.重": torch.ones(2)}
    found = load_file(written(path, tensors))
    assert {name: (tuple(each.shape), each.tolist()) for name, each in found.items()} == {
        name: (tuple(each.shape), each.tolist()) for name, each in tensors.items()
    }


def test_file_without_tensors_is_read_by_the_library_and_here(path):
    assert load_file(written(path, {})) == {}
    assert read_tensors(path) == {}


def test_what_the_library_writes_is_read_here(path):
    tensors = {"a": torch.randn(3, 5), "b": torch.tensor([True, False])}
    save_file(tensors, path, metadata={"who": "else"})
    assert plain(read_tensors(path)) == plain({name: from_torch(each) for name, each in tensors.items()})


def test_complex128_comes_back_as_it_was(path):
    tensors = {"z": torch.randn(2, 3, dtype=torch.complex128), "scalar": torch.tensor(1 - 2j, dtype=torch.complex128)}
    found = read_tensors(written(path, tensors))
    assert plain(found) == plain({name: from_torch(each) for name, each in tensors.items()})


def test_tensors_lie_aligned(path):
    tensors = {
        "odd": torch.ones(3, dtype=torch.int8),
        "wide": torch.ones(3, dtype=torch.float64),
        "short": torch.ones(5, dtype=torch.float16),
        "large": torch.ones(64, dtype=torch.uint8),
        "larger": torch.ones(1024),
    }
    found = read_tensors(written(path, tensors))
    places = {name: each.data.offset for name, each in found.items() if isinstance(each.data, Segment)}
    assert {name: place % ALIGNMENT for name, place in places.items() if name.startswith("larg")} == {
        "large": 0,
        "larger": 0,
    }
    assert not any(place % ITEM_SIZE[found[name].dtype] for name, place in places.items())


def test_tensors_of_segments_and_of_memory_are_written_alike(path, tmp_path):
    values = [torch.randn(700, 1000), torch.randn(3)]
    segments = SegmentWriter(tmp_path, "rank").write(map(from_torch, values))
    write(path, {"a": segments[0], "b": from_torch(values[1])})
    found = read_tensors(path)
    assert torch.equal(to_torch(found["a"]), values[0]) and torch.equal(to_torch(found["b"]), values[1])


def test_writing_a_segment_takes_little_memory(path, tmp_path):
    segment = tmp_path / "segment"
    with open(segment, "wb") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        write(path, {"a": TensorData("uint8", (64 << 20,), Segment(str(segment), 0, 64 << 20))})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert path.stat().st_size > 64 << 20


def test_segment_that_ends_early_is_no_error_of_the_storage(path, tmp_path):
    (tmp_path / "segment").write_bytes(b"123")
    with pytest.raises(InternalError):
        write(path, {"a": TensorData("uint8", (4,), Segment(str(tmp_path / "segment"), 0, 4))})


def with_header(header: Any, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (1 << 40).to_bytes(8, "little"),
        with_header(b"{"),
        with_header([]),
        with_header({"a": 3}),
        with_header(entry(dtype="F8_E4M3")),
        with_header(entry(shape=[3])),
        with_header(entry(shape=[-2])),
        with_header(entry(shape=[2.0])),
        with_header(entry(shape=[True, 2])),
        with_header(entry(data_offsets=[8, 16])),
        with_header(entry(data_offsets=[-8, 0])),
        with_header(entry(data_offsets=[0])),
        with_header({**entry(), "__metadata__": {"complex128": '["a"]'}}),
        with_header({**entry(), "__metadata__": {"complex128": "["}}),
    ],
)
def test_what_is_no_file_of_tensors_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError):
        read_tensors(path)


def test_every_cut_of_a_file_is_refused(path):
    whole = written(path, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.complex128)}).read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError):
            read_tensors(path)


def test_bytes_come_in_pieces_that_may_be_changed_afterwards(tmp_path):
    values = torch.arange(1 << 20)
    (segment,) = SegmentWriter(tmp_path, "rank").write([from_torch(values)])
    sizes = []

    class Sink(io.BytesIO):
        def write(self, piece: Any, /) -> int:
            sizes.append(len(piece))
            return super().write(piece)

    sink = Sink()
    write_tensors(sink, {"a": segment})
    assert max(sizes) <= 1 << 20 and sink.getvalue().endswith(values.numpy().tobytes())
