"""A model that waits for capacity says what it waits for, while its creator waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gradwire.errors import GradwireError
from gradwire_proto.v1 import gradient_service_pb2 as pb

if TYPE_CHECKING:
    from gradwire.rpc import Rpc

logger = logging.getLogger(__name__)

_FIRST_LOOK, _NEXT_LOOK = 1.0, 2.0
"""Seconds until it is first asked what the model waits for, and again."""

_PATIENCE = 5.0
"""Seconds for the answer."""


@contextmanager
def telling(rpc: Rpc, name: str) -> Iterator[None]:
    """Inside, a warning is logged when "models/{model}" waits for something, and when that changes."""
    over = threading.Event()
    # Nobody waits for it: an answer that is under way may come when all is over.
    threading.Thread(target=_watch, args=(rpc, name, over), name="gradwire-waits", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(rpc: Rpc, name: str, over: threading.Event) -> None:
    told, pause = "", _FIRST_LOOK
    while not over.wait(pause):
        pause = _NEXT_LOOK
        try:
            waits_for = rpc.ask("GetModel", pb.GetModelRequest(name=name), _PATIENCE).waits_for
        except (GradwireError, ValueError):
            continue  # It is not there yet, or nobody answers now: the call itself tells. ValueError: it was closed.
        if waits_for and waits_for != told and not over.is_set():
            logger.warning("%s waits for %s", name, waits_for)
            told = waits_for
