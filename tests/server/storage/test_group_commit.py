"""Many journals, one thread: what comes during an fsync shares the next one, and no failure is passed over."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from gradwire_server.storage.group_commit import GroupCommit


@pytest.fixture
def commits() -> Iterator[GroupCommit]:
    commits = GroupCommit()
    yield commits
    commits.close()


class Disk:
    """An fsync that takes until the test lets it go on."""

    def __init__(self) -> None:
        self.synced: list[str] = []
        self.threads: set[str] = set()
        self.begun = threading.Event()
        self.go = threading.Event()

    def sync_of(self, name: str, error: Exception | None = None):
        def sync() -> None:
            self.threads.add(threading.current_thread().name)
            self.begun.set()
            assert self.go.wait(10.0)
            self.synced.append(name)
            if error is not None:
                raise error

        return sync


async def test_what_comes_during_an_fsync_shares_the_next_one(commits: GroupCommit):
    disk = Disk()
    sync = disk.sync_of("a")
    first = commits.add("a", sync)
    await asyncio.to_thread(disk.begun.wait)
    others = [commits.add("a", sync) for _ in range(10)]
    disk.go.set()
    await asyncio.gather(first, *others)
    assert disk.synced == ["a", "a"]


async def test_future_waits_for_an_fsync_that_begins_after_it_was_asked_for(commits: GroupCommit):
    disk = Disk()
    sync = disk.sync_of("a")
    first = commits.add("a", sync)
    await asyncio.to_thread(disk.begun.wait)
    second = commits.add("a", sync)
    disk.begun.clear()
    disk.go.set()
    await first
    await second
    assert disk.begun.is_set()


async def test_all_journals_share_one_thread(commits: GroupCommit):
    disk = Disk()
    disk.go.set()
    await asyncio.gather(*(commits.add(name, disk.sync_of(name)) for name in "abc"))
    assert sorted(disk.synced) == ["a", "b", "c"] and disk.threads == {"group-commit"}


async def test_failure_ends_what_its_journal_asks_for_later_and_no_other(commits: GroupCommit):
    disk = Disk()
    blocking = commits.add("x", disk.sync_of("x"))
    bad = commits.add("a", disk.sync_of("a1", OSError("broken")))
    later = commits.add("a", disk.sync_of("a2"))
    other = commits.add("b", disk.sync_of("b"))
    disk.go.set()
    results = await asyncio.gather(blocking, bad, later, other, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), OSError, OSError, type(None)]
    assert disk.synced == ["x", "a1", "b"]


async def test_caller_that_went_away_disturbs_nobody(commits: GroupCommit):
    disk = Disk()
    sync = disk.sync_of("a")
    gone, other = commits.add("a", sync), commits.add("a", sync)
    gone.cancel()
    disk.go.set()
    await other


async def test_finish_returns_once_nothing_is_left(commits: GroupCommit):
    disk = Disk()
    commits.add("a", disk.sync_of("a"))
    waiting = asyncio.create_task(asyncio.to_thread(commits.finish, "a"))
    done, _ = await asyncio.wait([waiting], timeout=0.1)
    assert not done
    disk.go.set()
    await waiting
    assert disk.synced == ["a"]


async def test_close_syncs_what_is_left_first():
    disk, commits = Disk(), GroupCommit()
    future = commits.add("a", disk.sync_of("a"))
    disk.go.set()
    commits.close()
    assert disk.synced == ["a"]
    await future


def test_event_loop_that_ended_is_no_defect(commits: GroupCommit):
    disk = Disk()

    async def ask() -> None:
        commits.add("a", disk.sync_of("a"))

    asyncio.run(ask())
    disk.go.set()
    commits.finish("a")
    assert disk.synced == ["a"]
