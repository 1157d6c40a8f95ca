"""One thread that makes the journals of all models durable: what arrives during an fsync shares the next one."""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

Sync = Callable[[], None]


@dataclass(slots=True)
class _Batch:
    """What one owner waits for: syncs in order, each with its futures. One sync is there once, for all its futures."""

    waiting: dict[Sync, list[asyncio.Future[None]]] = field(default_factory=dict)


class GroupCommit:
    """Starts its thread when it is first needed. Only the thread of the event loop calls it, but for `finish`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._batches: dict[Hashable, _Batch] = {}
        self._busy: Hashable = None
        self._closed = False
        self._thread: threading.Thread | None = None

    def add(self, owner: Hashable, sync: Sync) -> asyncio.Future[None]:
        """A future that is done once `sync` was called after this moment.

        An owner's syncs run in the order in which they came; if one raises, its futures and those of the owner's later
        syncs get the error. It is never tried again: pages whose fsync failed may be dropped by the system, and a
        second fsync would say that all is well (https://wiki.postgresql.org/wiki/Fsync_Errors).
        """
        future = asyncio.get_running_loop().create_future()
        with self._changed:
            assert not self._closed
            self._batches.setdefault(owner, _Batch()).waiting.setdefault(sync, []).append(future)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="group-commit", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return future

    def finish(self, owner: Hashable) -> None:
        """Wait until nothing of `owner` is left to be synced."""
        with self._changed:
            self._changed.wait_for(lambda: owner not in self._batches and self._busy is not owner)

    def close(self) -> None:
        """Sync what is left, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._batches or self._closed)
                if not self._batches:
                    return
                self._busy = next(iter(self._batches))
                batch = self._batches.pop(self._busy)
            _commit(batch)


def _commit(batch: _Batch) -> None:
    failed: BaseException | None = None
    for sync, futures in batch.waiting.items():
        try:
            if failed is None:
                sync()
        except Exception as error:
            failed = error
        _settle(futures, failed)


def _settle(futures: list[asyncio.Future[None]], error: BaseException | None) -> None:
    """End the futures on their own event loop, all with one call; a loop that has closed no longer asks."""

    def settle() -> None:
        for future in futures:
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(copy.copy(error))

    try:
        futures[0].get_loop().call_soon_threadsafe(settle)
    except RuntimeError:
        logger.warning("the event loop ended before %d records were known to be durable", len(futures))
