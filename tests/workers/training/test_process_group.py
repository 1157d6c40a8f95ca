"""Ranks join, notice at once when one gives up, and join again."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = textwrap.dedent("""
    import os, sys, time, torch
    from gradwire_proto.errors import InternalError
    from gradwire_workers.process_group import ProcessGroups

    folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4] == "missing":
        began = time.monotonic()
        try:
            ProcessGroups.join(folder=folder, generation=1, rank=rank, size=size + 1, timeout=1.0)
        except InternalError as error:
            print(error.reason, time.monotonic() - began < 10)
        os._exit(0)
    groups = ProcessGroups.join(folder=folder, generation=1, rank=rank, size=size)
    for generation in range(2, 8):
        assert groups.all_reduce(torch.full((3,), rank + 1.0)).tolist() == [size * (size + 1) / 2] * 3
        assert groups.all_reduce(torch.tensor([rank]), largest=True).item() == size - 1
        assert groups.all_gather(torch.tensor([rank])).flatten().tolist() == list(range(size))
        assert groups.broadcast(torch.tensor([rank + 7])).item() == 7
        half = groups.all_reduce(torch.ones(2, dtype=torch.bfloat16))
        assert half.tolist() == [size, size]
        # The last rank gives up while it has begun a collective that the others wait for.
        began = time.monotonic()
        waiting = groups.start_all_reduce(torch.zeros(1 << 20))
        if rank == size - 1:
            time.sleep(0.05)
            groups.abort("tired")
        try:
            groups.wait(waiting)
            # Or it was over before.
            groups.all_reduce(torch.zeros(1)) if rank < size - 1 else None
            assert rank == size - 1
        except InternalError as error:
            assert error.reason == "PEER_FAILED"
        assert groups.failed and time.monotonic() - began < 5
        groups = groups.rejoin(generation)
    print("joined", generation)
    sys.stdout.flush()
    os._exit(0)
""")


def run(folder: Path, size: int, mode: str) -> list[str]:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(folder), str(rank), str(size), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    answers = [rank.communicate(timeout=100) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), answers
    return [output.strip() for output, _ in answers]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_join_again_after_one_gave_up(tmp_path, size):
    assert run(tmp_path, size, "all") == ["joined 7"] * size


@pytest.mark.slow
def test_rank_that_does_not_come_fails_the_others_in_time(tmp_path):
    assert run(tmp_path, 2, "missing") == ["PEER_FAILED True"] * 2
