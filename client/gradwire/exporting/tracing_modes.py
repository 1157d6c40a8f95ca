"""What of torch's modes is on while a user's code is run or traced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ambient_autocast_off() -> Iterator[None]:
    """An autocast that happens to be on around the call is no part of what runs inside."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield
