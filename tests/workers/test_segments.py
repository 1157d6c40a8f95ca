"""Big tensors travel as files that somebody always owns."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gradwire_proto.errors import ResourceExhausted
from gradwire_proto.lent_files import lend
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.values import Segment, TensorData
from gradwire_workers.segments import SegmentWriter, pieces, release, sweep


@pytest.fixture
def shared_memory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="gradwire-test-") as folder:
        yield Path(folder)


def test_tensors_of_all_shapes_come_back_from_one_file(tmp_path: Path):
    tensors = [torch.randn(3, 5), torch.empty(0, 4), torch.tensor(7), torch.rand(1001) > 0.5, torch.randn(700_001)]
    written = SegmentWriter(tmp_path, "rank-a").write(map(from_torch, tensors))
    assert len(list(tmp_path.iterdir())) == 1
    for before, after in zip(tensors, written, strict=True):
        assert isinstance(after.data, Segment)
        assert after.data.offset % 64 == 0
        assert torch.equal(to_torch(after), before)
        assert torch.equal(to_torch(after, writable=True), before)


def test_only_the_user_can_read_a_segment(tmp_path: Path):
    SegmentWriter(tmp_path, "rank-a").write([from_torch(torch.ones(3))])
    (path,) = tmp_path.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_file_that_was_lent_is_written_to_again_once_nobody_has_it(shared_memory: Path):
    writer = SegmentWriter(shared_memory, "rank-a")
    pages = []
    for number in range(4):
        values = torch.full((100_000,), float(number))
        (written,) = writer.write(from_torch(each) for each in (values,))
        assert isinstance(written.data, Segment) and torch.equal(to_torch(written), values)
        pages.append(os.stat(written.data.path).st_ino)
        if number == 1:
            kept = to_torch(written)
        lend(written.data.path)
    assert pages[0] == pages[1] != pages[2] == pages[3]
    assert torch.equal(kept, torch.full((100_000,), 1.0))  # pyright: ignore[reportPossiblyUnboundVariable]
    # Neither a file of another size, nor one that is small, is worth the search.
    for size in (300_000, 100):
        (written,) = writer.write([from_torch(torch.ones(size))])
        assert os.stat(written.data.path).st_ino not in pages  # pyright: ignore[reportAttributeAccessIssue]


def test_file_that_is_written_to_again_shows_nothing_of_what_was_there(shared_memory: Path):
    writer = SegmentWriter(shared_memory, "rank-a")
    (secret,) = writer.write([from_torch(torch.full((1_000_000,), 7, dtype=torch.uint8))])
    pages = os.stat(secret.data.path).st_ino  # pyright: ignore[reportAttributeAccessIssue]
    lend(secret.data.path)  # pyright: ignore[reportAttributeAccessIssue]
    written = writer.write([from_torch(torch.full((150_001,), value, dtype=torch.uint8)) for value in (1, 2)])
    path = Path(written[0].data.path)  # pyright: ignore[reportAttributeAccessIssue]
    assert os.stat(path).st_ino == pages
    assert path.read_bytes() == b"\1" * 150_001 + bytes(15) + b"\2" * 150_001


def test_release_unlinks_each_file_once_and_keeps_what_is_still_used(tmp_path: Path):
    writer = SegmentWriter(tmp_path, "rank-a")
    first, second = (writer.write([from_torch(torch.ones(3)), from_torch(torch.zeros(2))]) for _ in range(2))
    mapped = to_torch(first[0])
    release({"outputs": tuple(first), "gradients": {"w": second[0]}}, keep=[second[1]])
    assert [path.name for path in tmp_path.iterdir()] == ["rank-a-2"]
    assert torch.equal(mapped, torch.ones(3)), "a mapping outlives its name"
    release(second, second)
    assert not list(tmp_path.iterdir())


def test_sweep_takes_the_files_of_one_rank_only(tmp_path: Path):
    for name in ("rank-a", "rank-ab"):
        SegmentWriter(tmp_path, name).write([from_torch(torch.ones(3))])
    sweep(tmp_path, "rank-a")
    assert [path.name for path in tmp_path.iterdir()] == ["rank-ab-1"]


def test_a_write_that_fails_leaves_no_file(tmp_path: Path):
    def tensors():
        yield from_torch(torch.ones(3))
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        SegmentWriter(tmp_path, "rank-a").write(tensors())
    assert not list(tmp_path.iterdir())


def test_a_full_folder_is_resource_exhausted_and_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(ResourceExhausted, match="is full") as caught:
        SegmentWriter(tmp_path, "rank-a").write([from_torch(torch.ones(3))])
    assert caught.value.reason == "MEMORY_FOLDER_FULL"
    assert not list(tmp_path.iterdir())


def test_a_segment_that_was_cut_short_is_an_error(tmp_path: Path):
    (written,) = SegmentWriter(tmp_path, "rank-a").write([from_torch(torch.ones(3))])
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"1234")
    with pytest.raises(Exception, match=r"bytes|length|mmap"):
        to_torch(TensorData("float32", (3,), written.data), writable=True)


def test_adopted_files_are_the_adopters_and_outlive_who_made_them(tmp_path):
    theirs, mine = SegmentWriter(tmp_path, "rank-a"), SegmentWriter(tmp_path, "frontend")
    first, second = theirs.write([TensorData("uint8", (3,), b"abc"), TensorData("uint8", (2,), b"de")])
    inline = TensorData("uint8", (1,), b"f")
    adopted = mine.adopt({"a": first, "b": [second, None, inline, 1.5], "c": first})
    sweep(tmp_path, "rank-a")
    assert [path.name for path in tmp_path.iterdir()] == ["frontend-1"]
    assert [bytes(b"".join(pieces(each.data))) for each in (adopted["a"], adopted["b"][0])] == [b"abc", b"de"]
    assert adopted["c"] == adopted["a"]
    assert adopted["b"][1:] == [None, inline, 1.5]
