"""A rank that runs out of memory says so, and lives on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gradwire_proto.errors import ResourceExhausted


@contextmanager
def out_of_memory_told() -> Iterator[None]:
    """Raises torch's and Python's out-of-memory errors as ResourceExhausted (OUT_OF_MEMORY)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU, torch says it in words only.
        is_it = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not is_it:
            raise
        raise ResourceExhausted(f"a rank is out of memory: {error}", reason="OUT_OF_MEMORY") from error
