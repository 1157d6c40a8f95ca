"""Where checkpoints lie: folders that appear whole or not at all. The seam between what is written and where to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from gradwire_proto.errors import AlreadyExists, GradwireError
from gradwire_proto.names import checkpoint_name
from gradwire_server.storage.storage_errors import storage_error
from gradwire_server.storage.tensor_files import Sink


class Draft(Protocol):
    """A folder that nobody sees yet. It goes when its context ends before `commit`."""

    @property
    def place(self) -> str:
        """What stands before the names of its files where they are kept; "": nothing."""
        ...

    def file(self, name: str) -> AbstractContextManager[Sink]:
        """A new file; what was written is there when the context has ended."""
        ...

    def commit(self, manifest: bytes) -> None:
        """Make the folder visible, durably."""
        ...


class Folders(Protocol):
    """Folders by key, such as "named/best". Every call may block, and for a bounded time only.

    Those whose key begins with "auto/" are one owner's: each has its own (see `place`).

    Raises ResourceExhausted STORAGE_FULL, FailedPrecondition STORAGE_READ_ONLY, Unavailable STORAGE_UNREACHABLE.
    """

    def draft(self, key: str, *, replace: bool) -> AbstractContextManager[Draft]:
        """Without `replace`: AlreadyExists CHECKPOINT_EXISTS where a folder of that key is there."""
        ...

    def manifest(self, key: str) -> bytes | None:
        """None where there is no such folder."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """The keys of all folders that start with `prefix`, such as "auto/digits/" or ""."""
        ...

    def fetch(self, key: str, names: Mapping[str, str]) -> Path:
        """A new local folder with these files, which belongs to the caller. One that is not there is left out.

        names: by the name that each gets, the one that it has where it is kept.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove a folder, whole from the first moment on. One that is gone already is fine."""
        ...

    def sweep(self) -> None:
        """Remove what the owner's writers, which are gone, have left half-written. It may not be writing itself."""
        ...


def place(key: str, owner: str) -> str:
    """Where the folder of a key lies below the root: "auto/OWNER/digits/4" of "auto/digits/4"."""
    kind, separator, rest = key.partition("/")
    return f"auto/{owner}/{rest}" if kind == "auto" and separator else key


def checked(key: str) -> str:
    """`key`, which becomes a path: nothing but "named/NAME" or "auto/MODEL/NUMBER", of a checkpoint's name.

    Raises ValueError, or what `checkpoint_name` raises.
    """
    kind, _, name = key.partition("/")
    if kind not in ("auto", "named") or ("/" in name) != (kind == "auto"):
        raise ValueError(f"no key of a checkpoint: {key!r:.100}")
    checkpoint_name(name)
    return key


def is_key(key: str) -> bool:
    """Whether `checked` takes it. What else lies there is somebody else's."""
    try:
        return checked(key) == key
    except (ValueError, GradwireError):
        return False


def taken(key: str) -> AlreadyExists:
    """What is raised where a folder is to be made that exists."""
    name = key.partition("/")[2]
    return AlreadyExists(f"there is a checkpoint {name!r} already", field="checkpoint_id", reason="CHECKPOINT_EXISTS")


@contextmanager
def storage_errors(where: str, *, outcome: str = "not_applied") -> Iterator[None]:
    """Inside, what the storage `where` raises becomes the error that clients see."""
    try:
        yield
    except GradwireError:
        # Some of ours are also ConnectionErrors or TimeoutErrors.
        raise
    except OSError as error:
        raise storage_error(error, f"hold checkpoints in {where}", outcome=outcome) from error
