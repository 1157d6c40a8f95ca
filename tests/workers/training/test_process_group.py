"""Ranks join, notice at once when one gives up, and join again."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from torch_forks import TorchForks

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


@pytest.fixture
def run(torch_forks: TorchForks, tmp_path: Path) -> Callable[[int, str], list[str]]:
    """`run(size, mode)`: what so many ranks print."""

    def run(size: int, mode: str) -> list[str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM)
        ranks = [torch_forks.start(program, str(tmp_path), str(rank), str(size), mode) for rank in range(size)]
        assert all(rank.ends(100) for rank in ranks)
        printed = [rank.output.read().strip() for rank in ranks]
        for rank in ranks:
            rank.close()
        return printed

    return run


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_join_again_after_one_gave_up(run, size):
    assert run(size, "all") == ["joined 7"] * size


@pytest.mark.slow
def test_rank_that_does_not_come_fails_the_others_in_time(run):
    assert run(2, "missing") == ["PEER_FAILED True"] * 2
