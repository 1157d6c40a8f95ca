"""Files of memory that clients have filled and sealed: checked before anything of them is read."""

from __future__ import annotations

import os
from collections.abc import Sequence

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.local_wire import SEALS, aligned, has_seals
from gradwire_proto.values import Segment, TensorData
from gradwire_server.tensors.held_files import TensorType, check_bools

_PIECE = 1 << 20


class SealedFile:
    """Tensors in a memfd that nobody can change any more. It takes over the descriptor, and closes it if it refuses.

    Raises InvalidArgument UPLOAD_NOT_SEALED for a file that its sender could still change or shrink, and
    UPLOAD_TOO_SHORT or UPLOAD_TOO_LONG for one of another size than that of `types`.
    """

    def __init__(self, descriptor: int, types: Sequence[TensorType]) -> None:
        self._descriptor = descriptor
        self._types = types
        self._offsets, self.nbytes = aligned(kind.nbytes for kind in types)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    @property
    def tensors(self) -> list[TensorData]:
        """The tensors, in a file that processes of this user can open for as long as this is open."""
        path = f"/proc/{os.getpid()}/fd/{self._descriptor}"
        return [
            TensorData(kind.dtype, kind.shape, Segment(path, offset, kind.nbytes))
            for kind, offset in zip(self._types, self._offsets, strict=True)
        ]

    @property
    def bool_bytes(self) -> int:
        """Bytes that `check_bools` reads."""
        return sum(kind.nbytes for kind in self._types if kind.dtype == "bool")

    def check_bools(self) -> None:
        """InvalidArgument TENSOR_NOT_BOOL where a bool is neither 0 nor 1. May take long."""
        for index, (kind, offset) in enumerate(zip(self._types, self._offsets, strict=True)):
            if kind.dtype == "bool":
                for start in range(0, kind.nbytes, _PIECE):
                    piece = os.pread(self._descriptor, min(_PIECE, kind.nbytes - start), offset + start)
                    check_bools(piece, index)

    def close(self) -> None:
        """Let the file go: whoever has mapped it keeps it. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check(self) -> None:
        if not has_seals(self._descriptor, SEALS):
            raise InvalidArgument(
                "expected a memfd that is sealed against writing, shrinking, growing and more seals",
                field="manifest",
                reason="UPLOAD_NOT_SEALED",
            )
        size = os.fstat(self._descriptor).st_size
        if size != self.nbytes:
            raise InvalidArgument(
                f"expected a file of {self.nbytes} bytes for the tensors of the manifest, got {size}",
                field="manifest",
                reason="UPLOAD_TOO_SHORT" if size < self.nbytes else "UPLOAD_TOO_LONG",
            )
