"""A process that writes is killed at random moments: what it had acknowledged is there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gradwire_server.storage.journal import Journal
from gradwire_server.storage.storage_lock import StorageLock

ROUNDS = 10
WRITER = Path(__file__).with_name("journal_writer.py")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["process", "disk", "zeros"])
def test_what_a_killed_process_had_acknowledged_is_there(storage: Path, how: str):
    moments, acknowledged, killed_while_writing = random.Random(4), 0, 0
    for _ in range(ROUNDS):
        # Each round also opens the journal as the round before left it, and checks every record in it.
        writer = subprocess.Popen([sys.executable, WRITER, storage, how], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        first = writer.stdout.readline()
        time.sleep(moments.random() * 0.05)
        os.kill(writer.pid, signal.SIGKILL)
        assert writer.wait() == -signal.SIGKILL, "it ended by itself"
        # The last line may be cut off.
        lines = (first + writer.stdout.read()).split(b"\n")[:-1]
        writer.stdout.close()
        assert lines, "it was killed before it acknowledged anything"
        acknowledged = int(lines[-1])
        killed_while_writing += len(lines) > 1
    assert killed_while_writing > ROUNDS // 2
    lock = StorageLock.take(storage, 5.0)
    journal, entries = Journal.open(storage / "models" / "m", lock, durability="process", after=0)
    numbers = [entry.number for entry in entries]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) in (acknowledged, acknowledged + 1)
    assert lock.epoch == ROUNDS + 1
    journal.close()
    lock.release()
