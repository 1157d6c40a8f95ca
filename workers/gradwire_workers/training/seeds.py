"""Seeds of random operators: the same for the same model, command and rank, whatever was computed before."""

from __future__ import annotations

import torch

_MASK = (1 << 64) - 1


def mixed_seed(*numbers: int) -> int:
    """A seed of which about half the 64 bits change with any of the numbers (splitmix64, Steele et al., 2014)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def command_seed(*, model_seed: int, command: int, rank: int, given: int | None = None) -> int:
    """The seed of a rank in a command. One that the caller gave is rank 0's as it is, as for torch.manual_seed."""
    if given is None:
        return mixed_seed(model_seed, command, rank)
    return given & _MASK if rank == 0 else mixed_seed(given, rank)


def loss_seed(*, model_seed: int, command: int, given: int | None = None, drawn: bool) -> int:
    """The seed of a loss that every rank computes in full: the same on all. drawn: the forward has drawn some already.

    Rank 0's, as if it went on; but not the numbers that its forward has drawn once more.
    """
    first = command_seed(model_seed=model_seed, command=command, rank=0, given=given)
    return mixed_seed(first, 1) if drawn else first


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of `device`. torch.manual_seed takes a hundred times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.default_generators[device.index or torch.cuda.current_device()].manual_seed(seed)
