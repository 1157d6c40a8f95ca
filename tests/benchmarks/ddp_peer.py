"""What torchrun starts for `ddp.py`: as many steps of DDP as each line of rank 0's standard input says."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from benchmarks.local import LocalLoop
from benchmarks.networks import medium
from benchmarks.timing import mean
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    network = medium(rows=256 // dist.get_world_size())
    loop = LocalLoop(network, wrap=DistributedDataParallel)
    while steps := told():
        seconds = mean(lambda: loop.step(*network.batch), steps)
        if dist.get_rank() == 0:
            print(seconds, flush=True)
    dist.destroy_process_group()


def told() -> int:
    """How many steps come next; 0 at the end of the input."""
    steps = torch.tensor([int(sys.stdin.readline() or 0) if dist.get_rank() == 0 else 0])
    dist.broadcast(steps, 0)
    return int(steps)


if __name__ == "__main__":
    main()
