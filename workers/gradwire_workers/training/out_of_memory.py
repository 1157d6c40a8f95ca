"""A rank that runs out of memory says so, and lives on."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from gradwire_proto.errors import ResourceExhausted


def out_of_memory_told() -> AbstractContextManager[None]:
    """Raises torch's and Python's out-of-memory errors as ResourceExhausted (OUT_OF_MEMORY)."""
    return _TOLD


class _Told:
    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if not isinstance(error, (MemoryError, RuntimeError)):
            return
        # On the CPU, torch says it in words only.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise ResourceExhausted(f"a rank is out of memory: {error}", reason="OUT_OF_MEMORY") from error


_TOLD = _Told()
