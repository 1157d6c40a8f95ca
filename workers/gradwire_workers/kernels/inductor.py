"""torch's compiler, as it is set for kernels: in the process that compiles and in the rank that loads alike."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ARTIFACT, FORM, CONSTANTS = "kernels.bin", "form.json", "constants.pt"
REFUSED, ORDER, LOCK = "refused.txt", "order.bin", "lock"
"""The names of files in the folder of one order."""


def set_up(folder: Path) -> Any:
    """torch's compiler, which keeps what it writes in this folder from now on."""
    import torch._inductor
    from torch._inductor import config

    # Read each time that something is written or loaded.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")
    # One process, no helpers: it is to leave the processors to training.
    config.compile_threads = 1
    # What the processor can do is known; trying it out takes seconds, in each process.
    config.cpp.vec_isa_ok = True  # type: ignore[attr-defined]
    # They would lie in a folder that all users can write to.
    config.cpp_cache_precompile_headers = False
    return torch._inductor


OPTIONS = {"config_patches": {"fallback_random": True}}
"""Random operators draw what they draw in eager mode."""
