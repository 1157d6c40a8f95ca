"""Tensors in files of memory that client and service share: written and sealed here, or mapped as they came."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from typing import Any

import torch

from gradwire_proto.local_wire import SEALS, aligned
from gradwire_proto.tensors import torch_dtype
from gradwire_proto.values import TensorData

_COPIED_BYTES = 64 << 10
"""A tensor with fewer bytes is copied: it must not keep a whole file of others alive."""


def sealed_file(tensors: Sequence[TensorData]) -> int:
    """The descriptor of a memfd with the tensors' bytes, which nobody can change any more."""
    offsets, size = aligned(tensor.nbytes for tensor in tensors)
    descriptor = os.memfd_create("gradwire", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for tensor, offset in zip(tensors, offsets, strict=True):
            _write(descriptor, tensor.data, offset)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _write(descriptor: int, data: Any, offset: int) -> None:
    piece = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
    while piece:
        written = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[written:], offset + written


class MappedFile:
    """A file that came from the service, mapped copy on write for as long as a tensor of it lives."""

    def __init__(self, descriptor: int, size: int) -> None:
        # torch maps it without keeping a descriptor for it, as Python's mmap would.
        mapped = torch.from_file(f"/proc/self/fd/{descriptor}", shared=False, size=size, dtype=torch.uint8)
        self._memory = mapped.numpy().data

    def tensor(self, kind: TensorData, offset: int) -> torch.Tensor:
        """The tensor of that type at `offset`. Writing to it changes it alone, and never the file."""
        dtype = torch_dtype(kind.dtype)
        if kind.nbytes < _COPIED_BYTES:
            return _copy(self._memory[offset : offset + kind.nbytes], dtype).view(kind.shape)
        count = kind.nbytes // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, offset=offset, count=count).view(kind.shape)


def _copy(memory: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(memory), dtype=dtype) if memory else torch.empty(0, dtype=dtype)
