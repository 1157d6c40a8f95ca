"""What the first version wrote, kept in data/version-1, is opened by this one."""

from __future__ import annotations

import shutil
from pathlib import Path

from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry, StoredTensor, StoredUpload
from gradwire_server.storage.storage_lock import StorageLock

FIRST_VERSION = Path(__file__).parent / "data" / "version-1"
# Behind a checkpoint at command 6: two frontends wrote, the second was killed in the middle of command 12.
UPLOAD = StoredUpload(
    name="uploads/0123abcd",
    file="0123abcd",
    tensors=(
        StoredTensor(dtype="float32", shape=(2, 2), offset=0, nbytes=16),
        StoredTensor(dtype="int64", shape=(), offset=16, nbytes=8),
    ),
)
ENTRIES = [
    Entry(
        number=7,
        method="TrainStep",
        request=bytes(range(256)),
        reply=b"loss",
        request_id="6f9619ff-8b86-d011-b42d-00cf4fc964ff",
        body=bytes(range(32)),
    ),
    Entry(
        number=8,
        method="LoadStateDict",
        request=b"names an upload",
        reply=b"",
        request_id=None,
        body=b"\xff",
        uploads=(UPLOAD,),
    ),
    Entry(
        number=9,
        method="ForwardBackward",
        request=b"kills",
        reply=None,
        request_id=None,
        body=b"d",
        refused="the ranks ended twice: größer",
    ),
    Entry(number=10, method="OptimizerStep", request=b"", reply=None, request_id=None, body=b""),
    Entry(number=11, method="ZeroGrad", request=bytes(100), reply=bytes(3), request_id=None, body=b""),
]


def test_storage_of_the_first_version_opens_with_all_its_entries(tmp_path: Path):
    storage = tmp_path / "storage"
    shutil.copytree(FIRST_VERSION, storage)
    lock = StorageLock.take(storage, 0.0)
    assert lock.epoch == 4
    journal, entries = Journal.open(storage / "models" / "digits", lock, durability="process", after=6)
    assert list(entries) == ENTRIES and journal.last == 11
    assert journal.blobs.path(UPLOAD.file).read_bytes() == bytes(range(24))
    more = Entry(number=12, method="TrainStep", request=b"on", reply=b"", request_id=None, body=b"")
    journal.reserve(10)
    journal.append(more)
    assert list(journal.entries(10)) == [ENTRIES[-1], more]
    journal.close()
    lock.release()
