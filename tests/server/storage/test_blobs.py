"""Uploads that records name: kept as long as one of them is, whatever cuts the service off."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from gradwire_proto.errors import FailedPrecondition, Unavailable
from gradwire_server.fingerprints import file_fingerprint
from gradwire_server.storage.records import StoredTensor, StoredUpload
from gradwire_server.storage.segment_writer import SegmentWriter


@pytest.fixture
def upload(tmp_path: Path):
    """Makes the file of an upload, on the storage's own file system, or in memory."""

    def made(name: str, folder: Path = tmp_path) -> Path:
        path = folder / name
        path.write_bytes(name.encode() * 100)
        return path

    return made


def naming(*files: str, nbytes: int = 100) -> tuple[StoredUpload, ...]:
    tensor = StoredTensor(dtype="uint8", shape=(nbytes,), offset=0, nbytes=nbytes)
    return tuple(StoredUpload(name=f"uploads/{file}", file=file, tensors=(tensor,)) for file in files)


def blobs(model: Path) -> list[str]:
    return sorted(path.name for path in (model / "blobs").iterdir())


@pytest.fixture
def record(entry):
    def recorded(journal, number: int, *files: str) -> None:
        journal.reserve(100)
        journal.append(entry(number, uploads=naming(*files)))

    return recorded


@pytest.mark.parametrize("durability", ["process", "disk"])
def test_upload_on_the_same_disk_is_linked(open_journal, upload, durability):
    journal, _ = open_journal(durability=durability)
    source = upload("a")
    file = journal.keep_upload(source, "uploads/a")
    assert journal.blobs.path(file).samefile(source)
    source.unlink()
    assert journal.blobs.path(file).read_bytes() == b"a" * 100


def test_upload_on_another_disk_is_copied(open_journal, upload, mount):
    journal, _ = open_journal()
    source = upload("a", mount("-t", "tmpfs", "tmpfs"))
    kept = journal.blobs.path(journal.keep_upload(source, "uploads/a"))
    assert kept.read_bytes() == source.read_bytes() and not kept.samefile(source)


@pytest.mark.parametrize("name", ["uploads/../a", "uploads/", "a", "uploads/.a", "uploads/a/b"])
def test_name_that_leads_elsewhere_is_refused(open_journal, upload, name):
    with pytest.raises(ValueError, match="no name of an upload"):
        open_journal()[0].keep_upload(upload("a"), name)


def test_uploads_come_back_with_their_entries(open_journal, upload, record):
    journal, _ = open_journal()
    file = journal.keep_upload(upload("a"), "uploads/a")
    record(journal, 1, file)
    again, (found,) = open_journal()
    assert found.uploads == naming("a")
    assert again.blobs.path(found.uploads[0].file).read_bytes() == b"a" * 100


def test_blob_goes_with_the_last_record_that_names_it(open_journal, upload, record, model):
    journal, _ = open_journal()
    for name in "ab":
        journal.keep_upload(upload(name), f"uploads/{name}")
    record(journal, 1, "a", "b")
    journal.cut(0)()
    assert journal.keep_upload(upload("a"), "uploads/a") == "a"
    record(journal, 2, "a")
    journal.cut(1)()
    assert blobs(model) == ["a"]
    record(journal, 3)
    journal.cut(2)()
    assert blobs(model) == []


def test_blob_that_a_command_waits_for_stays(open_journal, upload, record, model):
    journal, _ = open_journal()
    journal.keep_upload(upload("a"), "uploads/a")
    record(journal, 1, "a")
    journal.cut(1)()
    journal.keep_upload(upload("a"), "uploads/a")
    journal.keep_upload(upload("b"), "uploads/b")
    record(journal, 2)
    journal.cut(2)()
    assert blobs(model) == ["a", "b"]
    record(journal, 3, "a", "b")
    assert len(open_journal(2)[1]) == 1


@pytest.mark.parametrize("before", [0, 1])
def test_blob_of_a_command_whose_record_failed_goes_when_the_journal_is_started_anew(
    open_journal, upload, record, model, monkeypatch, before
):
    journal, _ = open_journal()
    for number in range(before):
        journal.keep_upload(upload("a"), "uploads/a")
        record(journal, number + 1, "a")
    for name in "ab":
        journal.keep_upload(upload(name), f"uploads/{name}")
    with monkeypatch.context() as patched:
        patched.setattr(SegmentWriter, "write", lambda *_: os.fstat(-1))
        with pytest.raises(Unavailable):
            record(journal, before + 1, "a", "b")
    assert blobs(model) == ["a", "b"]
    journal.restart(before + 1)
    assert blobs(model) == []
    # What is kept from then on stays, as ever.
    journal.keep_upload(upload("a"), "uploads/a")
    record(journal, before + 2, "a")
    journal.cut(before + 1)()
    assert blobs(model) == ["a"]


@pytest.mark.parametrize("linked", [True, False])
def test_upload_id_that_comes_again_with_other_bytes_leaves_the_first_ones(
    open_journal, record, mount, tmp_path, linked
):
    journal, _ = open_journal()
    folder = tmp_path if linked else mount("-t", "tmpfs", "tmpfs")
    for number, data in enumerate((b"first" * 20, b"other" * 20), 1):
        source = folder / str(number)
        source.write_bytes(data)
        record(journal, number, journal.keep_upload(source, "uploads/a"))
    again, entries = open_journal()
    kept = [again.blobs.path(found.uploads[0].file).read_bytes() for found in entries]
    assert kept == [b"first" * 20, b"other" * 20]


def test_upload_id_that_comes_again_leaves_the_bytes_of_records_that_are_not_read(open_journal, upload, record):
    journal, _ = open_journal()
    record(journal, 1, journal.keep_upload(upload("a"), "uploads/a"))
    journal.cut(0)()
    record(journal, 2)
    again, _ = open_journal(after=1)
    source = upload("b")
    record(again, 3, again.keep_upload(source, "uploads/a"))
    first, _, third = open_journal(after=0)[1]
    kept = [again.blobs.path(found.uploads[0].file).read_bytes() for found in (first, third)]
    assert kept == [b"a" * 100, b"b" * 100]


def test_blob_of_a_refused_command_goes(open_journal, upload, record, model):
    journal, _ = open_journal()
    for name in ("a", "a", "b"):
        journal.keep_upload(upload(name), f"uploads/{name}")
    journal.drop_upload("b")
    journal.drop_upload("a")
    assert blobs(model) == ["a"]
    record(journal, 1, "a")
    journal.keep_upload(upload("a"), "uploads/a")
    journal.drop_upload("a")
    assert blobs(model) == ["a"], "a record names it"


def test_blobs_that_no_record_names_are_swept_at_a_start(open_journal, upload, record, model):
    journal, _ = open_journal()
    for name in "ab":
        journal.keep_upload(upload(name), f"uploads/{name}")
    record(journal, 1, "a")
    (model / "blobs" / ".c").write_bytes(b"half")
    open_journal()
    assert blobs(model) == ["a"]


def test_blobs_of_records_that_are_not_read_are_not_swept(open_journal, upload, record, model):
    journal, _ = open_journal()
    journal.keep_upload(upload("a"), "uploads/a")
    record(journal, 1, "a")
    journal.cut(0)()
    record(journal, 2)
    open_journal(after=1)
    assert blobs(model) == ["a"]
    assert len(open_journal(after=0)[1]) == 2


def test_blobs_of_records_that_were_not_read_go_when_these_are_cut(open_journal, upload, record, model):
    journal, _ = open_journal()
    record(journal, 1, journal.keep_upload(upload("a"), "uploads/a"))
    journal.cut(0)()
    record(journal, 2, journal.keep_upload(upload("b"), "uploads/b"))
    again, _ = open_journal(after=1)
    record(again, 3, again.keep_upload(upload("c"), "uploads/c"))
    again.keep_upload(upload("d"), "uploads/d")
    (model / "blobs" / ".d").write_bytes(b"half")
    (model / "blobs" / ".e").write_bytes(b"half")
    again.cut(1)()
    assert blobs(model) == [".d", "b", "c", "d"], "of what is read, of what was appended, and of what waits"


def test_missing_or_short_blob_is_reported_by_name(open_journal, upload, record, model):
    journal, _ = open_journal()
    journal.keep_upload(upload("a"), "uploads/a")
    record(journal, 1, "a")
    os.truncate(model / "blobs" / "a", 99)
    with pytest.raises(FailedPrecondition, match="uploads/a, which command 1 needs, is cut off") as caught:
        open_journal()
    assert caught.value.reason == "JOURNAL_CORRUPT"
    (model / "blobs" / "a").unlink()
    with pytest.raises(FailedPrecondition, match="is missing"):
        open_journal()
    assert open_journal(after=1)[1] == [], "a checkpoint holds what it was needed for"


def test_cut_that_is_cut_off_anywhere_leaves_what_is_needed(open_journal, upload, record, model, monkeypatch):
    unlink = Path.unlink
    numbers = range(1, 5)
    for steps in range(len(numbers) * 2):
        folder = model.with_name(f"m{steps}")
        journal, _ = open_journal(folder=folder)
        for number in numbers:
            journal.keep_upload(upload(f"u{number}"), f"uploads/u{number}")
            record(journal, number, f"u{number}")
            journal._begin_anew = True
        removed = []

        def crash(path: Path, missing_ok: bool = False, removed=removed, steps=steps) -> None:
            if len(removed) == steps:
                raise KeyboardInterrupt
            removed.append(path.name)
            unlink(path, missing_ok=missing_ok)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "unlink", crash)
            try:
                journal.cut(3)()
            except KeyboardInterrupt:
                assert len(removed) == steps
            else:
                assert len(removed) == 6
        again, entries = open_journal(3, folder=folder)
        assert [found.number for found in entries] == [4] and again.blobs.path("u4").exists()
        # Whatever record is left, its upload is, too.
        left = sorted(int(path.stem.split("-")[1]) for path in (folder / "journal").iterdir())
        for number in range(left[0], 5):
            assert again.blobs.path(f"u{number}").exists(), (steps, number)
        again.cut(3)()
        open_journal(3, folder=folder)
        assert blobs(folder) == ["u4"]


def test_cut_that_the_disk_refuses_is_told_and_can_be_repeated(open_journal, upload, record, model, monkeypatch):
    journal, _ = open_journal()
    journal.keep_upload(upload("a"), "uploads/a")
    record(journal, 1, "a")
    journal.cut(0)()
    record(journal, 2)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "as the test wants it")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", refuse)
        with pytest.raises(FailedPrecondition) as caught:
            journal.cut(1)()
    assert caught.value.reason == "STORAGE_READ_ONLY"
    assert len(open_journal()[1]) == 2 and blobs(model) == ["a"]
    journal.cut(1)()
    assert blobs(model) == []


def test_upload_whose_file_was_damaged_is_told(open_journal, upload, entry, model):
    journal, _ = open_journal()
    file = journal.keep_upload(upload("a"), "uploads/a")
    (whole,) = naming(file)
    journal.reserve(100)
    journal.append(entry(1, uploads=(replace(whole, fingerprint=file_fingerprint(journal.blobs.path(file))),)))
    assert [found.number for found in open_journal()[1]] == [1]
    data = bytearray((model / "blobs" / file).read_bytes())
    data[50] ^= 1
    (model / "blobs" / file).write_bytes(data)
    with pytest.raises(FailedPrecondition, match="uploads/a, which command 1 needs, is damaged") as caught:
        open_journal()
    assert caught.value.reason == "JOURNAL_CORRUPT"
