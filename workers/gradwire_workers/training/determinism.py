"""Whether torch may choose operators whose results depend on what else the machine does at the time."""

from __future__ import annotations

import os

import torch

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


def compute_repeatably(device: str, *, strictly: bool) -> None:
    """From here on, the same command on the same state gives the same bits.

    On the CPU always: sums over equal indices are added up by one thread, in order. On CUDA with `strictly`: then an
    operator that has no such kernel is refused when it runs; without, it runs as ever.
    """
    if device != "cpu" and not strictly:
        return
    torch.use_deterministic_algorithms(True, warn_only=not strictly)
    # Nothing reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if strictly:
        # Read when CUDA starts: before a rank has its first model.
        os.environ.setdefault(_CUBLAS, ":4096:8")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def compute_as_torch_does() -> None:
    """Undo it."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    os.environ.pop(_CUBLAS, None)
    torch.backends.cudnn.deterministic = False
