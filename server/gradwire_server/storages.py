"""Where each owner's models are kept: the default owner's in the storage itself, others' in folders below it."""

from __future__ import annotations

from gradwire_proto.errors import GradwireError
from gradwire_proto.token_file import DEFAULT_OWNER, check_name
from gradwire_server.model_storage import ModelStorage
from gradwire_server.storage.checkpoint_store import CheckpointStore
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.storage.storage_lock import StorageLock

_FOLDERS = "owners"
_PROBE = "probe"


class Storages:
    """See the module. checkpoint_url: what keeps checkpoints; None: each storage does."""

    def __init__(self, lock: StorageLock, checkpoint_url: str | None) -> None:
        self._lock = lock
        self._checkpoint_url = checkpoint_url

    def owners(self) -> list[str]:
        """Those who have something here, and the default owner."""
        folder = self._lock.storage / _FOLDERS
        try:
            found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []
        except OSError as error:
            raise storage_error(error, f"be opened ({folder})") from error
        return [DEFAULT_OWNER, *filter(_is_owner, found)]

    def check(self) -> None:
        """Whether the storage can be written to, and is still this frontend's. Blocks, and leaves nothing.

        Raises FailedPrecondition MODEL_FENCED, and the errors of `storage_error`.
        """
        self._lock.check()
        probe = self._lock.storage / _PROBE
        try:
            probe.write_bytes(b"\0")
            probe.unlink()
        except OSError as error:
            raise storage_error(error, f"be written to ({self._lock.storage})") from error

    def of(self, owner: str) -> ModelStorage:
        """One owner's."""
        place, url = self._lock.storage, self._checkpoint_url
        if owner != DEFAULT_OWNER:
            place = place / _FOLDERS / owner
            url = None if url is None else f"{url.rstrip('/')}/{_FOLDERS}/{owner}"
            try:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise storage_error(error, f"hold what belongs to {owner} ({place})") from error
        store = CheckpointStore(
            url or str(place / "checkpoints"), place / "fetched", owner=self._lock.storage_id, fence=self._lock.check
        )
        return ModelStorage(self._lock, store, place)


def _is_owner(name: str) -> bool:
    try:
        return check_name(name, "owner") != DEFAULT_OWNER
    except GradwireError:
        return False
