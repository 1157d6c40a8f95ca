"""A disk that is full or read-only refuses commands before they are carried out, and works again when it is not."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from gradwire_proto.errors import FailedPrecondition, ResourceExhausted
from gradwire_server.storage import disk_room
from gradwire_server.storage.disk_room import give_room_back, take_room
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import StoredTensor, StoredUpload
from gradwire_server.storage.storage_lock import StorageLock

KIB = 1 << 10


def no_allocation(file: int, start: int, nbytes: int) -> None:
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.fixture(params=["fallocate", "refused", "missing"])
def way(request, monkeypatch) -> str:
    """How room is taken: by the system, or by zeros where the file system or the C library has no other way."""
    offered = {"refused": lambda: no_allocation, "missing": lambda: None}
    if request.param in offered:
        monkeypatch.setattr(disk_room, "_fallocate", offered[request.param])
    return request.param


@pytest.fixture
def small_disk(mount) -> Path:
    """A file system of one MiB."""
    return mount("-t", "tmpfs", "-o", "size=1m", "tmpfs")


def fill_disk(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for _ in range(256):
            try:
                file.write(bytes(4 * KIB))
            except OSError:
                return filler
    pytest.fail("the disk is not full")


def test_room_that_was_taken_does_not_change_what_the_file_holds(tmp_path: Path, way: str):
    path = tmp_path / "file"
    with path.open("w+b", buffering=0) as file:
        file.write(b"abc")
        take_room(file.fileno(), 3, 300 * KIB)
        assert path.stat().st_blocks * 512 >= 300 * KIB
        assert path.stat().st_size == (3 if way == "fallocate" else 300 * KIB)
        assert path.read_bytes().rstrip(b"\0") == b"abc"
        give_room_back(file.fileno(), 3)
    assert path.read_bytes() == b"abc" and path.stat().st_blocks * 512 < 300 * KIB


def test_other_failures_of_the_system_are_told(tmp_path: Path):
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file, pytest.raises(OSError) as caught:
        take_room(file.fileno(), 0, 10)
    assert caught.value.errno == errno.EBADF


def test_reopened_after_a_kill_the_journal_ends_where_its_records_do(open_journal, entry, way: str):
    journal, _ = open_journal()
    for number in (1, 2):
        journal.reserve(100)
        journal.append(entry(number))
    again, entries = open_journal()  # Without a close: the first one's room is still taken.
    assert entries == [entry(1), entry(2)]
    again.reserve(100)
    again.append(entry(3))
    assert open_journal()[1] == [entry(1), entry(2), entry(3)]


def test_full_disk_refuses_before_the_command_and_works_again_with_room(small_disk: Path, entry, way: str):
    lock = StorageLock.take(small_disk, 0.0)
    journal, _ = Journal.open(small_disk / "models" / "m", lock, durability="process", after=0)
    journal.reserve(10 * KIB)
    journal.append(entry(1, 10 * KIB))
    filler = fill_disk(small_disk)
    for _ in range(2):
        with pytest.raises(ResourceExhausted) as caught:
            journal.reserve(400 * KIB)
        assert caught.value.reason == "STORAGE_FULL" and caught.value.outcome == "not_applied"
        assert journal.broken is None
    filler.unlink()
    journal.reserve(400 * KIB)
    journal.append(entry(2, 400 * KIB))
    assert list(journal.entries(0)) == [entry(1, 10 * KIB), entry(2, 400 * KIB)]
    journal.close()
    lock.release()


def test_room_that_was_reserved_cannot_be_taken_by_others(small_disk: Path, entry, way: str):
    lock = StorageLock.take(small_disk, 0.0)
    journal, _ = Journal.open(small_disk / "models" / "m", lock, durability="process", after=0)
    journal.reserve(300 * KIB)
    fill_disk(small_disk)
    journal.append(entry(1, 300 * KIB - 8))
    assert list(journal.entries(0)) == [entry(1, 300 * KIB - 8)]
    journal.close()
    lock.release()


def test_room_is_taken_for_what_is_said_of_uploads_however_many_tensors_they_have(small_disk: Path, entry):
    (small_disk / "m").mkdir()
    lock = StorageLock.take(small_disk / "storage", 0.0)
    journal, _ = Journal.open(small_disk / "m", lock, durability="process", after=0)
    tensor = StoredTensor(dtype="float32", shape=(1024, 1024), offset=1 << 40, nbytes=4 << 20)
    upload = StoredUpload(name="uploads/a", file="", tensors=(tensor,) * 5000)
    journal.reserve(100)
    filler = fill_disk(small_disk)
    with pytest.raises(ResourceExhausted):
        journal.reserve(100, [upload] * 4)
    filler.unlink()
    journal.reserve(100, [upload])
    fill_disk(small_disk)
    journal.append(entry(1, uploads=(upload,)))
    assert journal.broken is None
    journal.close()
    lock.release()


def test_refused_reservation_keeps_no_room_from_others(small_disk: Path, way: str):
    lock = StorageLock.take(small_disk, 0.0)
    journal, _ = Journal.open(small_disk / "models" / "m", lock, durability="process", after=0)
    with pytest.raises(ResourceExhausted):
        journal.reserve(2048 * KIB)
    assert fill_disk(small_disk).stat().st_size > 800 * KIB
    journal.close()
    lock.release()


def test_journal_opens_on_a_full_disk_and_reads(small_disk: Path, entry):
    lock = StorageLock.take(small_disk, 0.0)
    folder = small_disk / "models" / "m"
    journal, _ = Journal.open(folder, lock, durability="process", after=0)
    journal.reserve(10)
    journal.append(entry(1))
    journal.close()
    filler = fill_disk(small_disk)
    journal, entries = Journal.open(folder, lock, durability="process", after=0)
    assert list(entries) == [entry(1)]
    with pytest.raises(ResourceExhausted):
        journal.reserve(10)
    filler.unlink()
    journal.reserve(10)
    journal.append(entry(2))
    assert list(journal.entries(0)) == [entry(1), entry(2)]
    journal.close()
    lock.release()


def test_full_disk_takes_no_upload_and_keeps_no_part_of_it(small_disk: Path, tmp_path: Path):
    lock = StorageLock.take(small_disk, 0.0)
    journal, _ = Journal.open(small_disk / "models" / "m", lock, durability="process", after=0)
    source = tmp_path / "upload"
    source.write_bytes(b"x" * (2 << 20))
    with pytest.raises(ResourceExhausted) as caught:
        journal.keep_upload(source, "uploads/a")
    assert caught.value.reason == "STORAGE_FULL"
    assert list((small_disk / "models" / "m" / "blobs").iterdir()) == []
    source.write_bytes(b"y" * 1000)
    assert journal.blobs.path(journal.keep_upload(source, "uploads/a")).read_bytes() == b"y" * 1000
    journal.close()
    lock.release()


def test_read_only_disk_refuses_before_the_command_and_works_again(lock: StorageLock, model: Path, entry, mount):
    journal, _ = Journal.open(model, lock, durability="process", after=0)
    journal.reserve(10)
    journal.append(entry(1))
    journal.close()
    folder = mount("--bind", str(model))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    journal, entries = Journal.open(folder, lock, durability="process", after=0)
    assert list(entries) == [entry(1)]
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            journal.reserve(10)
        assert caught.value.reason == "STORAGE_READ_ONLY" and caught.value.outcome == "not_applied"
    with pytest.raises(FailedPrecondition) as caught:
        journal.keep_upload(Path(__file__), "uploads/a")
    assert caught.value.reason == "STORAGE_READ_ONLY"
    subprocess.run(["mount", "-o", "remount,bind,rw", str(folder)], check=True)
    journal.reserve(10)
    journal.append(entry(2))
    assert list(journal.entries(0)) == [entry(1), entry(2)]
    journal.close()
