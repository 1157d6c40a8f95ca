"""What a rank's process holds, so that one that leaks is not given to another model."""

from __future__ import annotations

import ctypes
import gc
import os
from dataclasses import dataclass
from pathlib import Path

# What a clean process may have more than it had: the groups of models that came before linger for a second or two,
# compute threads stay once they are there, and allocators keep a little. A leak passes these bounds sooner or later.
_MORE_BYTES = 256 << 20
_MORE_DESCRIPTORS = 256
_MORE_THREADS = 128


@dataclass(frozen=True, kw_only=True)
class RankFootprint:
    """Private memory in bytes, and counts of open file descriptors and of threads."""

    memory: int
    descriptors: int
    threads: int

    @classmethod
    def measure(cls) -> RankFootprint:
        """This process, after it has let go of everything that it can."""
        gc.collect()
        # Otherwise glibc keeps what a big model has freed.
        ctypes.CDLL(None).malloc_trim(0)
        status = Path("/proc/self/status").read_text().splitlines()
        anonymous = next(line for line in status if line.startswith("RssAnon:"))
        return cls(
            memory=int(anonymous.split()[1]) * 1024,
            descriptors=len(os.listdir("/proc/self/fd")),
            threads=len(os.listdir("/proc/self/task")),
        )

    def is_close_to(self, clean: RankFootprint) -> bool:
        """Whether a process that once had the footprint `clean` can be called clean again."""
        return (
            self.memory <= clean.memory + _MORE_BYTES
            and self.descriptors <= clean.descriptors + _MORE_DESCRIPTORS
            and self.threads <= clean.threads + _MORE_THREADS
        )
