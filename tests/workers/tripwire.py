"""A tripwire: it notes every call of anything that pickles, unpickles or belongs to Ray."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

FORBIDDEN = ("pickle", "_pickle", "cloudpickle", "ray", "_raylet")


@contextmanager
def tripwire() -> Iterator[list[str]]:
    """Watches every Python and C function that this thread calls; gives the forbidden ones."""
    trips: list[str] = []

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            module, name = frame.f_globals.get("__name__"), frame.f_code.co_name
        elif event == "c_call":
            module = getattr(argument, "__module__", None) or type(getattr(argument, "__self__", None)).__module__
            name = argument.__name__
        else:
            return
        if isinstance(module, str) and any(part in FORBIDDEN for part in module.split(".")):
            trips.append(f"{module}.{name}")

    sys.setprofile(watch)
    try:
        yield trips
    finally:
        sys.setprofile(None)
