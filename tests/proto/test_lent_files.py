"""A file that is lent is taken back only when nobody has it any more."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradwire_proto.lent_files import is_unused, lend, take_back


@pytest.fixture
def made(tmp_path: Path) -> Iterator[str]:
    path = Path("/dev/shm") / f"gradwire-test-{os.getpid()}-{tmp_path.name[:20]}"
    path.write_bytes(b"x" * 8192)
    yield str(path)
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()


def opened(path: str) -> Callable[[], None]:
    file = os.open(path, os.O_RDONLY)
    return lambda: os.close(file)


def mapped(path: str) -> Callable[[], None]:
    file = os.open(path, os.O_RDONLY)
    memory = mmap.mmap(file, 8192, access=mmap.ACCESS_COPY)
    os.close(file)
    return memory.close


def mapped_by_a_fork(path: str) -> Callable[[], None]:
    close = mapped(path)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    close()
    os.close(reader)

    def end() -> None:
        os.close(writer)
        os.waitpid(child, 0)

    return end


@pytest.mark.parametrize("keep", [opened, mapped, mapped_by_a_fork])
def test_file_that_somebody_has_is_not_taken_back(made, keep):
    let_go = keep(made)
    lent = lend(made)
    assert take_back(made, 8192, f"{made}-new") is None
    let_go()
    file = take_back(made, 8192, f"{made}-new")
    assert file is not None and not Path(lent).exists()
    os.pwrite(file, b"y", 0)
    os.close(file)
    assert Path(f"{made}-new").read_bytes()[:2] == b"yx"


@pytest.mark.parametrize("size", [8193, 2047])
def test_file_of_another_size_is_left_alone(made, size):
    lend(made)
    assert take_back(made, size, f"{made}-new") is None
    assert Path(f"{made}.lent").exists()


def test_file_that_was_not_lent_or_is_gone_is_not_taken_back(made):
    assert take_back(made, 8192, f"{made}-new") is None
    os.unlink(lend(made))
    assert take_back(made, 8192, f"{made}-new") is None


def test_who_writes_to_a_file_has_it(made):
    file = os.open(made, os.O_WRONLY)
    assert is_unused(file)
    other = os.open(made, os.O_RDWR)
    assert not is_unused(file)
    os.close(other)
    assert is_unused(file)
    os.close(file)
