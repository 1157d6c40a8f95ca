"""Writes records until it is killed, and prints the number of each that it may acknowledge: STORAGE HOW.

It checks first that what is there are the records that it writes, in order. HOW: a durability, or "zeros" for a file
system that cannot take room ahead.
"""

from __future__ import annotations

import asyncio
import errno
import random
import sys
from pathlib import Path

from gradwire_server.storage import disk_room
from gradwire_server.storage import journal as journal_module
from gradwire_server.storage.journal import Journal
from gradwire_server.storage.records import Entry
from gradwire_server.storage.storage_lock import StorageLock


def entry(number: int) -> Entry:
    source = random.Random(number)
    request = source.randbytes(source.choice([10, 3_000, 100_000]))
    return Entry(
        number=number, method="TrainStep", request=request, reply=source.randbytes(9), request_id=None, body=b""
    )


def no_allocation(file: int, start: int, nbytes: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "as the test wants it")


async def write(storage: Path, how: str) -> None:
    lock = StorageLock.take(storage, 5.0)
    durability = "disk" if how == "disk" else "process"
    journal, entries = Journal.open(storage / "models" / "m", lock, durability=durability, after=0)
    for number, found in enumerate(entries, 1):
        assert found == entry(number), number
    while True:
        new = entry(journal.last + 1)
        journal.reserve(len(new.request) + 9)
        if (durable := journal.append(new)) is not None:
            await durable
        print(new.number, flush=True)


if __name__ == "__main__":
    journal_module.SEGMENT_BYTES = 1 << 20
    if sys.argv[2] == "zeros":
        disk_room._fallocate = lambda: no_allocation  # type: ignore[assignment]
    asyncio.run(write(Path(sys.argv[1]), sys.argv[2]))
