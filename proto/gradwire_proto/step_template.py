"""Requests for training steps that differ in their tensors' bytes and request ids alone, without a message for each.

Most steps of a training loop do. Building and parsing a message takes longer than all else about a small step, and what
is the same in all of them need be built and looked at once: the rest is cut out of the request's bytes, or put in.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from gradwire_proto.encoding.nested_tensors import tensors_of
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import tensor_pb2

_LEAST_BYTES = 16
"""Fewer bytes of a tensor might be found anywhere in the request."""

_VIEWED_BYTES = 16 << 10
"""Tensors with fewer bytes are copied out of a request, which takes less time than a view of it."""

_REQUEST_ID = re.compile(rb"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_ID_BYTES = 36


class StepTemplate:
    """What such requests have in common. `count`: tensors of the batch, in the order in which `match` gives them."""

    def __init__(self, pieces: Sequence[bytes], spans: Sequence[tuple[int, int]], request_id: int) -> None:
        self._pieces = tuple(pieces)
        self._spans = tuple(spans)
        self._id_at = request_id
        self._size = spans[-1][1] + len(pieces[-1])
        starts = [0, *(stop for _, stop in spans)]
        stops = [*(start for start, _ in spans), self._size]
        self._fixed = [
            (start, stop, piece) for start, stop, piece in zip(starts, stops, pieces, strict=True) if start < stop
        ]
        self._tensors = [span for index, span in enumerate(spans) if index != request_id]
        self._id = spans[request_id]

    @property
    def size(self) -> int:
        """Bytes of every such request."""
        return self._size

    def match(self, raw: bytes) -> tuple[list[Any], str] | None:
        """(the tensors' bytes, the request id) where `raw` is such a request; None where it is not."""
        if len(raw) != self._size:
            return None
        for start, stop, piece in self._fixed:
            if raw[start:stop] != piece:
                return None
        start, stop = self._id
        if _REQUEST_ID.fullmatch(raw, start, stop) is None:
            return None
        data: list[Any] = [
            raw[first:last] if last - first < _VIEWED_BYTES else memoryview(raw)[first:last]
            for first, last in self._tensors
        ]
        return data, raw[start:stop].decode()

    def fill(self, data: Sequence[Any], request_id: str) -> bytes:
        """The request with these tensors' bytes, as many of each as before, and this id in lower case."""
        values = [*data]
        values.insert(self._id_at, request_id.encode())
        parts = [self._pieces[0]]
        for value, piece in zip(values, self._pieces[1:], strict=True):
            parts += (value, piece)
        return b"".join(parts)


def template_of(request: pb.TrainStepRequest, raw: bytes | None = None) -> StepTemplate | None:
    """The template of this request, whose bytes are `raw`; None where it has to be built and parsed as a message."""
    tensors = list(tensors_of(request.batch.inputs)) + list(tensors_of(request.batch.targets))
    if not all(map(_can_be_cut_out, tensors)) or len(request.request_id) != _ID_BYTES:
        return None
    if raw is not None and request.SerializeToString() != raw:
        return None  # Another way to write it: whoever does may write the next otherwise.
    marked = pb.TrainStepRequest()
    marked.CopyFrom(request)
    marks = []
    for tensor in [*tensors_of(marked.batch.inputs), *tensors_of(marked.batch.targets)]:
        mark, nbytes = os.urandom(_LEAST_BYTES), len(tensor.data)
        tensor.data = mark + bytes(nbytes - _LEAST_BYTES)
        marks.append((mark, nbytes))
    marked.request_id = os.urandom(_ID_BYTES // 2).hex()
    written = marked.SerializeToString()
    spans = [(start, start + nbytes) for mark, nbytes in marks if (start := written.find(mark)) >= 0]
    at = written.find(marked.request_id.encode())
    in_order = sorted([*spans, (at, at + _ID_BYTES)])
    if len(spans) < len(marks) or in_order[:-1] != spans or any(a[1] > b[0] for a, b in pairwise(in_order)):
        return None
    edges = [0, *(edge for span in in_order for edge in span), len(written)]
    pieces = [written[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
    return StepTemplate(pieces, in_order, len(spans))


def _can_be_cut_out(tensor: tensor_pb2.Tensor) -> bool:
    # The bytes of a bool are looked at when the message is decoded.
    has_data = tensor.WhichOneof("content") == "data" and len(tensor.data) >= _LEAST_BYTES
    return has_data and tensor.dtype != tensor_pb2.DTYPE_BOOL
