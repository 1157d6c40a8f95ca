"""What a temporary storage has put elsewhere, and nobody will ask for when it is gone."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from gradwire_proto.errors import GradwireError
from gradwire_server.storage.storage_lock import StorageLock
from gradwire_server.storages import Storages

logger = logging.getLogger(__name__)


def remove_automatic_checkpoints(storage: Path, url: str, seconds: float) -> None:
    """Remove the automatic checkpoints of the models of `storage`, which nobody uses any more, from `url`.

    Waits so many seconds at most; then what is left stays, as it does where the store is not there.
    """
    # A daemon: the process must not wait at its end for a store that does not answer.
    removing = threading.Thread(target=_remove, args=(storage, url), daemon=True)
    removing.start()
    removing.join(seconds)
    if removing.is_alive():
        logger.warning("not all checkpoints of models that are gone were removed from %s in %g s", url, seconds)


def _remove(storage: Path, url: str) -> None:
    try:
        lock = StorageLock.take(storage, 0.0)
        try:
            storages = Storages(lock, url)
            for owner in storages.owners():
                storages.of(owner).checkpoints.remove_own()
        finally:
            lock.release()
    except GradwireError as error:
        logger.warning("checkpoints of models that are gone could not be removed: %s", error)
