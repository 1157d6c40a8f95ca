"""The random numbers around an export: seeded for comparisons, put back afterwards, and Python's own watched."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradwire_proto.errors import ExportError


def cuda_devices(values: Iterable[Any]) -> frozenset[int]:
    """The indices of the CUDA devices on which any of the values lies."""
    return frozenset(value.get_device() for value in values if isinstance(value, Tensor) and value.is_cuda)


def seed(devices: Iterable[int] = ()) -> None:
    """Seed torch's generator, and those of these CUDA devices, with 0.

    Unlike torch.manual_seed it leaves other devices alone, and queues nothing where CUDA has not started.
    """
    torch.default_generator.manual_seed(0)
    for device in devices:
        torch.cuda.default_generators[device].manual_seed(0)


@contextmanager
def random_state_kept(devices: Iterable[int] = ()) -> Iterator[None]:
    """After, the states of torch (on CPU and these CUDA devices), random and numpy.random are as before."""
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(numpy)
        for device, kept in cuda.items():
            torch.cuda.set_rng_state(kept, device)


@contextmanager
def python_random_refused(subject: str) -> Iterator[None]:
    """Raise ExportError EXPORT_PYTHON_RANDOM where `random` or `numpy.random` are drawn from inside.

    A graph would keep for ever what was drawn when it was exported.
    """
    python, numpy = random.getstate(), np.random.get_state(legacy=False)
    yield
    name = "random" if random.getstate() != python else None
    if name is None and not _same(np.random.get_state(legacy=False), numpy):
        name = "numpy.random"
    if name is not None:
        raise ExportError(
            f"{subject} draws from Python's {name}, and a graph would keep what was drawn now: draw with torch"
            " (torch.rand, torch.where), or draw outside and pass the number as an input",
            reason="EXPORT_PYTHON_RANDOM",
        )


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_same(one[name], other[name]) for name in one)
    return bool(np.array_equal(one, other))
