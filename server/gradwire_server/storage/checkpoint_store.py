"""Checkpoints by key: "named/NAME", and "auto/MODEL/NUMBER" for those that nobody asked for.

Several services may share the named ones. The others are of one storage, and lie in a folder of its own.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from gradwire_proto.errors import CheckpointNotFound, FailedPrecondition, InvalidArgument
from gradwire_proto.names import checkpoint_name
from gradwire_proto.values import Checkpoint
from gradwire_server.storage.checkpoint_files import check_file, read_files, write_files
from gradwire_server.storage.checkpoint_folders import Folders, checked, storage_errors, taken
from gradwire_server.storage.local_folders import LocalFolders
from gradwire_server.storage.manifest import (
    Manifest,
    decode_manifest,
    encode_manifest,
)
from gradwire_server.storage.object_folders import ObjectFolders
from gradwire_server.storage.saved_model import SavedModel

T = TypeVar("T")

logger = logging.getLogger(__name__)

_THREADS = 16


def key_of(name: str) -> str:
    """The key of what `Checkpoint.name` says: "best", or "digits/100" of an automatic one."""
    return f"auto/{name}" if "/" in name else f"named/{name}"


class CheckpointStore:
    """Checkpoints in a folder, or wherever fsspec reaches. Every method may block; `threads` are for them.

    url: a path, or a URL such as s3://bucket/folder with fsspec's `options` for it. cache: a folder of the service, in
    which files that are fetched get a folder of their own. owner: the id of the service's storage: automatic
    checkpoints of others are neither seen nor touched. fence: raises where another service has taken over the storage.
    patience: seconds that one call of a remote store may take.

    Raises ResourceExhausted STORAGE_FULL, FailedPrecondition STORAGE_READ_ONLY, Unavailable STORAGE_UNREACHABLE, and
    ConfigError for a URL that means nothing.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        options: Mapping[str, str] | None = None,
        *,
        owner: str,
        fence: Callable[[], None] = lambda: None,
        patience: float = 30.0,
    ) -> None:
        scheme, separator, path = url.partition("://")
        files = cache / "fetched-checkpoints"
        self._folders: Folders
        if not separator or scheme == "file":
            self._folders = LocalFolders(Path(path if separator else url), files, owner, fence)
        else:
            self._folders = ObjectFolders(url, options or {}, files, owner, fence, patience)
        self.threads = ThreadPoolExecutor(_THREADS, "checkpoints")
        """Where the methods are to be called: a store that does not answer holds these for a while, and no others."""
        self._claims: set[str] = set()
        self._lock = threading.Lock()

    def write(self, key: str, saved: SavedModel) -> Checkpoint:
        """Make a checkpoint, all of it or nothing. An automatic one takes the place of one with the same number.

        AlreadyExists CHECKPOINT_EXISTS where the name is taken, but for the request that made that one: it gets the
        first answer.
        """
        with self._claimed(key):
            if not saved.automatic and (first := self.answered(key, saved.model_id, saved.request_id)):
                return first
            with self._folders.draft(key, replace=saved.automatic) as draft:
                manifest = Manifest.of(saved, write_files(draft, saved), draft.place)
                draft.commit(encode_manifest(manifest))
        return manifest.checkpoint()

    def answered(self, key: str, model_id: str, request_id: str | None) -> Checkpoint | None:
        """The checkpoint that this request made, None where there is none. AlreadyExists where another made it."""
        content = self._folders.manifest(key)
        if content is None:
            return None
        found = decode_manifest(content, _name(key))
        if request_id is None or found.request_id != request_id:
            raise taken(key)
        if found.model_id != model_id:
            raise InvalidArgument(
                f"{request_id} was the id of another request; each needs its own",
                field="request_id",
                reason="REQUEST_ID_REUSED",
            )
        return found.checkpoint()

    def get(self, key: str) -> Checkpoint:
        """What clients see of a checkpoint; of its files only the manifest is looked at. CheckpointNotFound."""
        return self._manifest(key).checkpoint()

    def read(self, key: str) -> SavedModel:
        """The model of a checkpoint. Its tensors are segments of files that belong to the caller (see `remove_files`).

        CheckpointNotFound; FailedPrecondition CHECKPOINT_VERSION, and CHECKPOINT_CORRUPT where a single bit is wrong.
        """
        manifest = self._manifest(key)
        folder = self._folders.fetch(key, manifest.names)
        try:
            with storage_errors(str(folder)):
                for name, expected in manifest.files.items():
                    check_file(folder / name, expected, _name(key))
                return read_files(folder, manifest, _name(key))
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, FailedPrecondition) and self._folders.manifest(key) is None:
                # Deleted meanwhile.
                raise _not_found(key) from None
            raise

    def list(self, prefix: str = "") -> list[Checkpoint]:
        """The checkpoints whose key starts with `prefix`, by key. Those that cannot be read are logged and left out."""
        return [manifest.checkpoint() for manifest in self._manifests(prefix)]

    def requests(self, model_id: str) -> frozenset[str]:
        """The ids of the requests that made the named checkpoints of a model."""
        found = (each.request_id for each in self._manifests("named/") if each.model_id == model_id)
        return frozenset(each for each in found if each is not None)

    def _manifests(self, prefix: str) -> Iterator[Manifest]:
        for key in self._folders.keys(prefix):
            try:
                yield self._manifest(key)
            except CheckpointNotFound:
                pass
            except FailedPrecondition as error:
                logger.warning("%s", error)

    def automatic(self, model_id: str) -> list[int]:
        """The numbers of a model's automatic checkpoints, newest first."""
        keys = self._folders.keys(f"auto/{model_id}/")
        numbers = (key.rpartition("/")[2] for key in keys)
        return sorted((int(number) for number in numbers if number.isdecimal()), reverse=True)

    def newest(self, model_id: str) -> str | None:
        """The key of a model's newest automatic checkpoint."""
        numbers = self.automatic(model_id)
        return f"auto/{model_id}/{numbers[0]}" if numbers else None

    def delete(self, key: str) -> None:
        """Remove a checkpoint. CheckpointNotFound."""
        if self._folders.manifest(checked(key)) is None:
            raise _not_found(key)
        self._folders.delete(key)

    def delete_automatic(self, model_id: str) -> None:
        """Remove every automatic checkpoint of a model that goes."""
        for number in self.automatic(model_id):
            self._folders.delete(f"auto/{model_id}/{number}")

    def remove_own(self) -> None:
        """Remove every automatic checkpoint of the owner, and what was left half-written, for a storage that goes."""
        for key in self._folders.keys("auto/"):
            self._folders.delete(key)
        self._folders.sweep()

    def sweep(self) -> None:
        """Remove what earlier services left half-written. For a service that has just taken the storage over."""
        self._folders.sweep()

    def _manifest(self, key: str) -> Manifest:
        content = self._folders.manifest(checked(key))
        if content is None:
            raise _not_found(key)
        return decode_manifest(content, _name(key))

    @contextmanager
    def _claimed(self, key: str) -> Iterator[None]:
        """Inside, nobody else writes there."""
        with self._lock:
            if checked(key) in self._claims:
                raise taken(key)
            self._claims.add(key)
        try:
            yield
        finally:
            with self._lock:
                self._claims.remove(key)


def _name(key: str) -> str:
    return key.partition("/")[2]


def _not_found(key: str) -> CheckpointNotFound:
    name = _name(key)
    return CheckpointNotFound(
        f"there is no checkpoint {name!r}", reason="CHECKPOINT_NOT_FOUND", resource=checkpoint_name(name)
    )
