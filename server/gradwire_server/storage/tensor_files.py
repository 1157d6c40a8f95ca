"""Files of safetensors, written and read bit by bit: no tensor is ever whole in memory.

The format is that of github.com/huggingface/safetensors: the length of the header in 8 bytes, the header in JSON, the
bytes of the tensors one behind the other, without a gap. It has no complex128: such a tensor stands as float64 with a
last dimension of 2, and the header's metadata names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

from gradwire_proto.errors import InternalError
from gradwire_proto.values import ITEM_SIZE, Handle, NamedTensors, Segment, TensorData

ALIGNMENT = 64
"""The first tensor starts at a multiple of this many bytes, and so does every one whose size is a multiple of it until
the first that is not: those come first. All others are aligned to their elements."""

HEADER_BYTES = 100_000_000
"""The longest header that readers of safetensors take."""

RESERVED = "__metadata__"
"""The one name that no tensor can have in such a file."""

PIECE_BYTES = 1 << 20

_CODES: Mapping[str, str] = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "complex64": "C64",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_PAIRS = "complex128"


class Sink(Protocol):
    """What bytes are written to. Whoever writes may change them once `write` has returned."""

    def write(self, piece: bytes | memoryview, /) -> object: ...


def holds(name: str, dtype: str) -> bool:
    """Whether a file of safetensors can have a tensor of this type under this name."""
    return name != RESERVED and dtype in _CODES


def write_tensors(file: Sink, tensors: Mapping[str, TensorData]) -> None:
    """Write `tensors` as one file of safetensors. Those in segments are read piece by piece."""
    # Larger elements first, as the library has it, for whoever maps the file.
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT > 0, -ITEM_SIZE[item[1].dtype]))
    header, end = {}, 0
    pairs = [name for name, tensor in ordered if tensor.dtype == _PAIRS]
    header[RESERVED] = {"format": "pt", **({_PAIRS: json.dumps(pairs)} if pairs else {})}
    for name, tensor in ordered:
        assert name != RESERVED, name
        shape = [*tensor.shape, 2] if tensor.dtype == _PAIRS else list(tensor.shape)
        code = _CODES.get(tensor.dtype, "F64")
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)
    buffer = memoryview(bytearray(PIECE_BYTES))
    for _, tensor in ordered:
        for piece in _pieces(tensor, buffer):
            file.write(piece)


def read_tensors(path: Path) -> NamedTensors:
    """The tensors of a file, as segments of it. Raises ValueError where it is not what `write_tensors` writes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = int.from_bytes(file.read(8), "little") + 8
        if not 8 <= start <= min(size, HEADER_BYTES):
            raise ValueError("its header is longer than the file")
        header = json.loads(file.read(start - 8))
    if not isinstance(header, dict):
        raise ValueError("its header is no mapping")
    metadata = header.pop(RESERVED, {})
    pairs = set(json.loads(metadata.get(_PAIRS, "[]")))
    return {name: _located(name, entry, name in pairs, path, start, size) for name, entry in header.items()}


def _located(name: str, entry: Any, paired: bool, path: Path, start: int, size: int) -> TensorData:
    try:
        dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header does not describe {name!r:.80}") from None
    if not all(type(each) is int and each >= 0 for each in (*shape, begin, end)):
        raise ValueError(f"its header does not describe {name!r:.80}")
    if end - begin != prod(shape) * ITEM_SIZE[dtype] or start + end > size:
        raise ValueError(f"{name!r:.80} does not have the bytes of its shape")
    if paired:
        if dtype != "float64" or shape[-1:] != (2,):
            raise ValueError(f"{name!r:.80} is no pair of float64")
        dtype, shape = _PAIRS, shape[:-1]
    data = Segment(str(path), start + begin, end - begin) if end > begin else b""
    return TensorData(dtype, shape, data)


def _pieces(tensor: TensorData, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a tensor, wherever they are. Those of a segment pass through `buffer`."""
    data = tensor.data
    assert not isinstance(data, Handle), data
    if not isinstance(data, Segment):
        flat = memoryview(data).cast("B")
        assert flat.nbytes == tensor.nbytes, tensor.shape
        yield from (flat[start : start + len(buffer)] for start in range(0, flat.nbytes, len(buffer)))
        return
    assert data.nbytes == tensor.nbytes, tensor.shape
    try:
        yield from _segment_pieces(data, buffer)
    except OSError as error:
        # Not the fault of whatever is written to.
        raise InternalError(f"segment {data.path}: {error}") from error


def _segment_pieces(segment: Segment, buffer: memoryview) -> Iterator[memoryview]:
    left = segment.nbytes
    with open(segment.path, "rb", buffering=0) as file:
        file.seek(segment.offset)
        while left:
            count = file.readinto(buffer[: min(left, len(buffer))])
            if not count:
                raise OSError(f"ends {left} bytes early")
            left -= count
            yield buffer[:count]
