"""A store of objects that fails, stalls, fills up and loses bytes: told in time, and nothing half-written is shown."""

from __future__ import annotations

import contextlib
import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem
from server.storage.checkpoint_cases import OWNER, automatic, content, net, saved_model

from gradwire_proto.errors import (
    FailedPrecondition,
    GradwireError,
    ResourceExhausted,
    Unavailable,
)
from gradwire_server.config import ConfigError
from gradwire_server.storage.checkpoint_store import CheckpointStore

NAMED = "named/best"


class Upload:
    """An object that is there when it was written to its end."""

    def __init__(self, objects: Objects, path: str) -> None:
        self._objects = objects
        self._path = path
        self._pieces: list[bytes] = []
        self.closed = False

    def write(self, piece: Any) -> int:
        self._objects.meet("write")
        self._pieces.append(bytes(piece))
        return len(piece)

    def close(self) -> None:
        if not self.closed:
            self._objects.meet("close")
            self.closed = True
            self._objects.held[self._path] = self._objects.kept(b"".join(self._pieces))

    def discard(self) -> None:
        self._objects.meet("discard")
        self.closed = True


class Objects(AbstractFileSystem):
    """Objects in memory. `trouble` is called with the name of each call, and may raise or wait; `kept`: what a write
    keeps, and a read gives, of some bytes.
    """

    protocol = "objects"
    root_marker = ""
    held: ClassVar[dict[str, bytes]] = {}
    trouble: ClassVar[Callable[[str], None]]
    kept: ClassVar[Callable[[bytes], bytes]]

    @classmethod
    def mend(cls) -> None:
        cls.trouble = staticmethod(lambda _: None)
        cls.kept = staticmethod(lambda data: data)

    def meet(self, call: str) -> None:
        type(self).trouble(call)

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        self.meet("open")
        assert mode == "wb"
        return Upload(self, path)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        self.meet("cat_file")
        return self.kept(self._held(path)[start:end])

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        self.meet("pipe_file")
        if mode == "create" and path in self.held:
            raise FileExistsError(path)
        self.held[path] = value

    def find(self, path: str, maxdepth: Any = None, withdirs: bool = False, detail: bool = False, **_: Any) -> Any:
        self.meet("find")
        return [each for each in self.held if each.startswith(f"{path}/")]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        self.meet("info")
        return {"name": path, "size": len(self._held(path)), "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        self.meet("exists")
        return path in self.held

    def rm_file(self, path: str) -> None:
        self.meet("rm_file")
        self._held(path)
        del self.held[path]

    def _held(self, path: str) -> bytes:
        if path not in self.held:
            raise FileNotFoundError(path)
        return self.held[path]


@pytest.fixture(autouse=True)
def objects() -> Iterator[type[Objects]]:
    fsspec.register_implementation("objects", Objects, clobber=True)
    Objects.held.clear()
    Objects.mend()
    before = set(threading.enumerate())
    yield Objects
    Objects.mend()
    # What was given up, and goes on now, belongs to this test.
    for thread in set(threading.enumerate()) - before:
        thread.join(5)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore("objects://bucket/gradwire", tmp_path / "cache", owner=OWNER, patience=0.3)


@pytest.fixture
def segments(tmp_path: Path) -> Path:
    folder = tmp_path / "segments"
    folder.mkdir()
    return folder


def refusal(call: Callable[[], Any]) -> GradwireError:
    with pytest.raises(GradwireError) as refused:
        call()
    return refused.value


class Trouble:
    """Lets `after` calls pass, and meets the next ones with `act`."""

    def __init__(self, after: int, act: Callable[[], None]) -> None:
        self.left = after
        self.act = act
        self.calls: list[str] = []

    def __call__(self, call: str) -> None:
        self.calls.append(call)
        self.left -= 1
        if self.left < 0:
            self.act()


def lose_connection() -> None:
    raise ConnectionResetError("connection reset by peer")


def calls_of(objects: type[Objects], act: Callable[[], Any]) -> list[str]:
    counted = objects.trouble = Trouble(10**9, lose_connection)
    act()
    objects.mend()
    return counted.calls


def test_manifest_is_put_last_and_removed_first(store, segments, objects):
    calls = calls_of(objects, lambda: store.write(NAMED, saved_model(segments)))
    assert calls[-1] == "pipe_file" and calls.count("pipe_file") == 1
    counted = objects.trouble = Trouble(3, lose_connection)
    refusal(lambda: store.delete(NAMED))
    assert counted.calls[:3] == ["cat_file", "find", "rm_file"]
    objects.mend()
    assert store.list() == [] and len(objects.held) == 7


def test_store_that_goes_away_at_any_moment_shows_nothing_by_halves(store, segments, objects):
    saved = saved_model(segments)
    count = len(calls_of(objects, lambda: store.write(NAMED, saved)))
    store.delete(NAMED)
    for after in range(count):
        objects.held.clear()
        objects.trouble = Trouble(after, lose_connection)
        error = refusal(lambda: store.write(NAMED, saved))
        assert isinstance(error, Unavailable) and error.reason == "STORAGE_UNREACHABLE" and error.retryable
        # Whether the last call did what it was asked nobody knows.
        assert error.outcome == ("unknown" if after == count - 1 else "not_applied")
        objects.mend()
        assert store.list() == []
    store.write(NAMED, saved)
    assert content(store.read(NAMED)) == content(saved)


def test_replaced_one_is_old_or_new_and_always_there(store, segments, objects):
    old, new = automatic(segments, 4), automatic(segments, 4, module=net(1), spec=b"another")
    store.write("auto/digits/4", old)
    for after in range(len(calls_of(objects, lambda: store.write("auto/digits/4", new)))):
        store.write("auto/digits/4", old)
        objects.trouble = Trouble(after, lose_connection)
        with contextlib.suppress(GradwireError):  # It is there, and only the old one could not be removed.
            store.write("auto/digits/4", new)
        objects.mend()
        (found,) = store.list()
        read = store.read(f"auto/{found.name}")
        assert content(read) in (content(old), content(new))
        read.remove_files()


@pytest.mark.parametrize("creates", [True, False])
def test_two_services_that_save_one_name_at_once_end_with_one_of_them_whole(
    store, segments, objects, tmp_path, monkeypatch, creates
):
    if not creates:
        # A store that cannot put what must not be there yet: it is asked a last time before.
        monkeypatch.setattr(objects, "pipe_file", lambda self, path, value: objects.held.update({path: value}))
        store = CheckpointStore("objects://bucket/gradwire", tmp_path / "cache", owner=OWNER, patience=0.3)
    other = CheckpointStore("objects://bucket/gradwire", tmp_path / "other", owner="f" * 16, patience=0.3)
    one, two = saved_model(segments), saved_model(segments, module=net(1))

    def overtake() -> None:
        objects.mend()
        other.write(NAMED, two)

    for after in range(1, len(calls_of(objects, lambda: store.write(NAMED, one)))):
        store.delete(NAMED)
        objects.trouble = Trouble(after, overtake)
        assert refusal(lambda: store.write(NAMED, one)).reason == "CHECKPOINT_EXISTS"
        read = store.read(NAMED)
        assert content(read) == content(two) and len(objects.held) == 8
        read.remove_files()


def test_manifest_that_lands_after_it_was_given_up_is_not_looked_at(store, segments, objects, tmp_path):
    store.write("auto/digits/0", automatic(segments, 0))
    store.write(NAMED, saved_model(segments))
    go = threading.Event()

    def wait(call: str) -> None:
        if call == "pipe_file":
            objects.mend()
            go.wait(60)

    objects.trouble = staticmethod(wait)
    assert refusal(lambda: store.write("auto/digits/2", automatic(segments, 2))).outcome == "unknown"
    for again in (store, CheckpointStore("objects://bucket/gradwire", tmp_path / "cache", owner=OWNER)):
        assert again.automatic("digits") == [0]
    replaced = automatic(segments, 2, module=net(1))
    store.write("auto/digits/2", replaced)
    before = len(objects.held)
    go.set()
    while len(objects.held) == before:
        time.sleep(0.01)
    assert content(store.read("auto/digits/2")) == content(replaced)
    again = CheckpointStore("objects://bucket/gradwire", tmp_path / "cache", owner=OWNER)
    again.sweep()
    assert len(objects.held) == 3 * 8 and content(again.read("auto/digits/2")) == content(replaced)


def test_reader_whose_store_goes_away_is_told_and_leaves_nothing(store, segments, objects, tmp_path):
    store.write(NAMED, saved_model(segments))
    count = len(calls_of(objects, lambda: store.read(NAMED).remove_files()))
    for after in range(count):
        objects.trouble = Trouble(after, lose_connection)
        assert refusal(lambda: store.read(NAMED)).reason == "STORAGE_UNREACHABLE"
        assert list((tmp_path / "cache/fetched-checkpoints").iterdir()) == []


def test_store_that_does_not_answer_is_told_in_time(store, segments, objects):
    saved = saved_model(segments)
    count = len(calls_of(objects, lambda: store.write(NAMED, saved)))
    store.delete(NAMED)
    wake = threading.Event()
    try:
        for after in (0, 1, 3, count // 2, count - 1):
            objects.trouble = Trouble(after, lambda: wake.wait(60))
            began = time.monotonic()
            error = refusal(lambda: store.write(NAMED, saved))
            assert error.reason == "STORAGE_UNREACHABLE" and "no answer" in str(error)
            assert time.monotonic() - began < 5
            objects.mend()
            assert store.list() == []
        for read in (store.list, lambda: store.read(NAMED), lambda: store.newest("digits")):
            objects.trouble = Trouble(0, lambda: wake.wait(60))
            assert refusal(read).reason == "STORAGE_UNREACHABLE"
    finally:
        wake.set()


def test_calls_that_never_return_do_not_pile_up(store, objects):
    wake = threading.Event()
    objects.trouble = Trouble(0, lambda: wake.wait(60))
    before = threading.active_count()
    try:
        for _ in range(12):
            assert refusal(store.list).reason == "STORAGE_UNREACHABLE"
        assert threading.active_count() - before <= 8
        objects.mend()
        # None is begun before one of those has returned.
        assert refusal(store.list).reason == "STORAGE_UNREACHABLE"
    finally:
        wake.set()
    for _ in range(100):
        try:
            assert store.list() == []
            return
        except Unavailable:
            time.sleep(0.05)
    raise AssertionError("the store is not asked again")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ResourceExhausted, "STORAGE_FULL"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), ResourceExhausted, "STORAGE_FULL"),
        (PermissionError("Forbidden"), FailedPrecondition, "STORAGE_READ_ONLY"),
        (OSError(errno.EROFS, "Read-only file system"), FailedPrecondition, "STORAGE_READ_ONLY"),
        (RuntimeError("signature=SECRET"), Unavailable, "STORAGE_UNREACHABLE"),
        (OSError("signature=SECRET"), Unavailable, "STORAGE_UNREACHABLE"),
    ],
)
def test_what_the_client_library_raises_is_told_without_its_text(store, segments, objects, error, kind, reason):
    def fail() -> None:
        raise error

    objects.trouble = Trouble(4, fail)
    refused = refusal(lambda: store.write(NAMED, saved_model(segments)))
    assert isinstance(refused, kind) and refused.reason == reason and "SECRET" not in str(refused)
    objects.mend()
    assert store.list() == []
    store.write(NAMED, saved_model(segments))


def test_object_that_lost_its_end_is_noticed_before_it_is_shown(store, segments, objects):
    objects.kept = staticmethod(lambda data: data[:-1])
    assert refusal(lambda: store.write(NAMED, saved_model(segments))).reason == "STORAGE_UNREACHABLE"
    objects.mend()
    assert store.list() == [] and not objects.held


def test_object_that_is_read_short_is_noticed(store, segments, objects):
    store.write(NAMED, saved_model(segments))
    objects.kept = staticmethod(lambda data: data if b"gradwire-checkpoint" in data else data[:-1])
    assert refusal(lambda: store.read(NAMED)).reason == "CHECKPOINT_CORRUPT"


def test_what_failed_is_removed_where_the_store_still_answers(store, segments, objects):
    saved = saved_model(segments)

    def fail_once() -> None:
        objects.mend()
        raise OSError(errno.ENOSPC, "No space left on device")

    objects.trouble = Trouble(12, fail_once)
    assert refusal(lambda: store.write(NAMED, saved)).reason == "STORAGE_FULL"
    assert not objects.held


@pytest.mark.parametrize("url", ["nowhere://bucket", "s3://bucket"])
def test_url_that_cannot_be_used_is_an_error_of_the_setting(url, tmp_path, monkeypatch):
    # As where it is not installed.
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"^checkpoint_url: "):
        CheckpointStore(url, tmp_path, owner=OWNER)
