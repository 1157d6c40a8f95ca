"""Requests with a batch that differ in their tensors' bytes alone: what is the same in all is built and read once."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

from gradwire_proto.encoding.nested_tensors import tensors_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2

_LEAST_BYTES = 16
"""Fewer bytes of a tensor might be found anywhere in the request."""

_VIEWED_BYTES = 16 << 10
"""Tensors with fewer bytes are copied out of a request, which takes less time than a view of it."""

ID_BYTES = 36
"""Bytes of a request id that can be cut out."""

RequestT = TypeVar("RequestT", pb.TrainStepRequest, pb.ComputeGradientsRequest)


class RequestTemplate:
    """What such requests have in common: `pieces`, with what differs between them, which lies at `spans`."""

    def __init__(self, pieces: Sequence[bytes], spans: Sequence[tuple[int, int]]) -> None:
        self._pieces = tuple(pieces)
        self._spans = tuple(spans)
        self._size = spans[-1][1] + len(pieces[-1])
        starts = [0, *(stop for _, stop in spans)]
        stops = [*(start for start, _ in spans), self._size]
        self._fixed = [
            (start, stop, piece) for start, stop, piece in zip(starts, stops, pieces, strict=True) if start < stop
        ]

    @property
    def size(self) -> int:
        """Bytes of every such request."""
        return self._size

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are the same in all of them."""
        return sum(map(len, self._pieces))

    def cut(self, raw: bytes) -> list[Any] | None:
        """What lies at the spans where `raw` is such a request; None where it is not."""
        if len(raw) != self._size:
            return None
        for start, stop, piece in self._fixed:
            if raw[start:stop] != piece:
                return None
        return [
            raw[first:last] if last - first < _VIEWED_BYTES else memoryview(raw)[first:last]
            for first, last in self._spans
        ]

    def join(self, values: Sequence[Any]) -> bytes:
        """The request with these values at the spans, as many bytes of each as before."""
        parts = [self._pieces[0]]
        for value, piece in zip(values, self._pieces[1:], strict=True):
            parts += (value, piece)
        return b"".join(parts)


def bytes_besides_tensors(request: RequestT, raw: bytes) -> int:
    """Bytes of the request, which are `raw`, less those of its batch's tensors."""
    return len(raw) - sum(len(tensor.data) for tensor in _batch_tensors(request))


def template_parts(request: RequestT, raw: bytes | None = None) -> tuple[list[bytes], list[tuple[int, int]]] | None:
    """(pieces, spans) of the template of this request, whose bytes are `raw`: one span for each tensor of its batch, in
    order, and behind them one for the request id where requests of its kind have one.

    None where it has to be built and parsed as a message.
    """
    if not all(map(_can_be_cut_out, _batch_tensors(request))):
        return None
    if isinstance(request, pb.TrainStepRequest) and len(request.request_id) != ID_BYTES:
        return None
    if raw is not None and request.SerializeToString() != raw:
        return None  # Another way to write it: whoever does may write the next otherwise.
    marked = copy.deepcopy(request)
    marks = []
    for tensor in _batch_tensors(marked):
        mark, nbytes = os.urandom(_LEAST_BYTES), len(tensor.data)
        tensor.data = mark + bytes(nbytes - _LEAST_BYTES)
        marks.append((mark, nbytes))
    if isinstance(marked, pb.TrainStepRequest):
        marked.request_id = os.urandom(ID_BYTES // 2).hex()
        marks.append((marked.request_id.encode(), ID_BYTES))
    written = marked.SerializeToString()
    spans = [(start, start + nbytes) for mark, nbytes in marks if (start := written.find(mark)) >= 0]
    return _pieces(written, spans) if spans and len(spans) == len(marks) else None


def _pieces(written: bytes, spans: list[tuple[int, int]]) -> tuple[list[bytes], list[tuple[int, int]]] | None:
    if any(before[1] > after[0] for before, after in pairwise(spans)):
        return None
    edges = [0, *(edge for span in spans for edge in span), len(written)]
    return [written[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)], spans


def _can_be_cut_out(tensor: tensor_pb2.Tensor) -> bool:
    # The bytes of a bool are looked at when the message is decoded.
    has_data = tensor.WhichOneof("content") == "data" and len(tensor.data) >= _LEAST_BYTES
    return has_data and tensor.dtype != tensor_pb2.DTYPE_BOOL


def _batch_tensors(request: pb.TrainStepRequest | pb.ComputeGradientsRequest) -> list[tensor_pb2.Tensor]:
    return [*tensors_of(request.batch.inputs), *tensors_of(request.batch.targets)]
