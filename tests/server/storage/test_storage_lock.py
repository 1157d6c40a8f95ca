"""One frontend writes at a time, and only to a folder of its own version."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwire_proto.errors import FailedPrecondition
from gradwire_server.storage.storage_lock import FORMAT, StorageLock


def test_new_folder_gets_the_format_and_epoch_one(storage: Path):
    lock = StorageLock.take(storage, 0.0)
    assert (storage / "format").read_text() == "gradwire-storage 1\n"
    assert lock.epoch == 1 and (storage / "epoch").read_text() == "1\n"
    assert storage.stat().st_mode & 0o077 == 0
    lock.check()
    lock.release()


def test_epoch_grows_with_every_start(storage: Path):
    for epoch in (1, 2, 3):
        lock = StorageLock.take(storage, 0.0)
        assert lock.epoch == epoch
        lock.release()


def test_storage_has_an_id_of_its_own_for_as_long_as_it_is_there(storage: Path, tmp_path: Path):
    ids = []
    for folder in (storage, storage, tmp_path / "other"):
        lock = StorageLock.take(folder, 0.0)
        ids.append(lock.storage_id)
        lock.release()
    assert ids[0] == ids[1] != ids[2] and ids[0] == (storage / "id").read_text().strip()


def test_id_that_is_damaged_is_refused(storage: Path):
    StorageLock.take(storage, 0.0).release()
    (storage / "id").write_text("../other")
    with pytest.raises(FailedPrecondition, match="should hold an id") as caught:
        StorageLock.take(storage, 0.0)
    assert caught.value.reason == "STORAGE_VERSION"


def test_second_service_on_the_folder_is_refused_and_hears_who_has_it(storage: Path, lock: StorageLock):
    with pytest.raises(FailedPrecondition, match=r"in use by another service \(process \d+\)") as caught:
        StorageLock.take(storage, 0.0)
    assert caught.value.reason == "STORAGE_LOCKED"
    lock.check()


def test_patience_outlasts_a_service_that_ends(storage: Path):
    code = (
        "import sys, time; from pathlib import Path; from gradwire_server.storage.storage_lock import StorageLock;"
        "lock = StorageLock.take(Path(sys.argv[1]), 0.0); print(flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code, storage], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin and other.stdout and other.stdout.readline()
    with pytest.raises(FailedPrecondition):
        StorageLock.take(storage, 0.1)
    other.kill()
    started = time.monotonic()
    lock = StorageLock.take(storage, 30.0)
    assert lock.epoch == 2 and time.monotonic() - started < 20.0
    lock.release()
    other.communicate()


def test_one_that_was_taken_over_from_is_fenced_for_good(storage: Path, lock: StorageLock):
    (storage / "lock").unlink()  # As an operator does who takes it for stale.
    other = StorageLock.take(storage, 0.0)
    for _ in range(2):
        with pytest.raises(FailedPrecondition) as caught:
            lock.check()
        assert caught.value.reason == "MODEL_FENCED"
    other.check()
    other.release()


@pytest.mark.parametrize("text", ["gradwire-storage 2\n", "something else", ""])
def test_folder_of_another_version_is_refused_by_name_and_left_alone(storage: Path, text: str):
    storage.mkdir()
    (storage / "format").write_text(text)
    with pytest.raises(FailedPrecondition) as caught:
        StorageLock.take(storage, 0.0)
    assert caught.value.reason == "STORAGE_VERSION"
    assert repr(text.strip()) in str(caught.value) and repr(FORMAT) in str(caught.value)
    assert [path.name for path in storage.iterdir()] == ["format"]


def test_models_without_a_format_are_not_taken_for_ours(storage: Path):
    (storage / "models" / "m").mkdir(parents=True)
    with pytest.raises(FailedPrecondition) as caught:
        StorageLock.take(storage, 0.0)
    assert caught.value.reason == "STORAGE_VERSION"


def test_folder_with_logs_alone_is_a_new_one(storage: Path):
    (storage / "logs").mkdir(parents=True)
    StorageLock.take(storage, 0.0).release()


def test_epoch_that_is_no_number_is_refused(storage: Path):
    storage.mkdir()
    (storage / "epoch").write_text("one")
    with pytest.raises(FailedPrecondition, match="epoch should hold a number"):
        StorageLock.take(storage, 0.0)
    (storage / "epoch").write_text("4")
    lock = StorageLock.take(storage, 0.0)  # The failed one holds no lock.
    assert lock.epoch == 5
    lock.release()


def test_read_only_folder_is_refused_as_such(storage: Path, mount):
    storage.mkdir()
    folder = mount("--bind", str(storage))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
    with pytest.raises(FailedPrecondition) as caught:
        StorageLock.take(folder, 0.0)
    assert caught.value.reason == "STORAGE_READ_ONLY"
