"""Memory for batches: used again once they were read, and left alone where there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gradwire_workers import step_memory
from gradwire_workers.step_memory import CAPACITY, LEAST_BYTES, MappedMemory, Region, StepMemory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "steps"


@pytest.fixture
def memory(path: Path) -> Iterator[StepMemory]:
    memory = StepMemory(lambda: str(path))
    yield memory
    memory.close()


def placed(memory: StepMemory, content: bytes) -> Region:
    region = memory.place([content])
    assert region is not None
    return region


def test_bytes_are_read_where_they_were_placed_and_their_place_is_used_again(memory, path):
    mapped = MappedMemory()
    first, second = placed(memory, b"a" * LEAST_BYTES), placed(memory, b"b" * 100_000)
    assert bytes(mapped.view(list(first))) == b"a" * LEAST_BYTES
    assert bytes(mapped.view(list(second))) == b"b" * 100_000
    assert first.offset + first.nbytes <= second.offset
    memory.free(first)
    # What was used last is nearest: the lowest place that is large enough.
    third, fourth = placed(memory, b"c" * 100_000), placed(memory, b"d" * LEAST_BYTES)
    assert fourth.offset == first.offset and third.offset > second.offset
    assert [bytes(mapped.view(list(each)))[:1] for each in (second, third, fourth)] == [b"b", b"c", b"d"]
    assert path.stat().st_mode & 0o077 == 0


def test_parts_lie_one_after_another(memory):
    region = memory.place([b"a" * LEAST_BYTES, memoryview(b"bc"), b""])
    assert bytes(MappedMemory().view(list(region)))[-3:] == b"abc"


def test_what_is_small_or_has_no_room_travels_in_its_message(memory, path):
    assert memory.place([b"a" * (LEAST_BYTES - 1)]) is None and not path.exists()
    assert memory.place([bytes(CAPACITY + 1)]) is None
    whole = placed(memory, bytes(CAPACITY))
    assert memory.place([bytes(LEAST_BYTES)]) is None
    memory.free(whole)
    assert memory.place([bytes(LEAST_BYTES)]) is not None
    assert memory.place([b"a" * 100] * 2000) is None


def test_full_folder_is_no_error(memory, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step_memory.os, "pwritev", full)
        assert memory.place([bytes(LEAST_BYTES)]) is None
    # What was written in part is not used.
    with monkeypatch.context() as patch:
        patch.setattr(step_memory.os, "pwritev", lambda *_: 5)
        assert memory.place([bytes(LEAST_BYTES)]) is None
    assert placed(memory, bytes(LEAST_BYTES)).offset == 0


def test_file_goes_with_the_model(memory, path):
    region = placed(memory, b"a" * LEAST_BYTES)
    view = MappedMemory().view(list(region))
    memory.close()
    assert not path.exists() and bytes(view) == b"a" * LEAST_BYTES
