"""A model has no size limit but memory: 1 GiB of weights up and down, past a frontend that stays small."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

GIB = 1 << 30


def anonymous_memory(pid: int) -> int:
    """RssAnon of a process, in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@contextmanager
def peak_growth_below(pid: int, bound: int) -> Iterator[None]:
    """The process's RssAnon, sampled every 20 ms, stays less than `bound` bytes above where it started."""
    start, peak, over = anonymous_memory(pid), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, anonymous_memory(pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert peak - start < bound, f"grew by {(peak - start) >> 20} MiB"


class Ballast(nn.Module):
    """Little to compute, a lot to carry."""

    def __init__(self, nbytes: int, parts: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.parts = nn.ParameterList(
            nn.Parameter(torch.empty(nbytes // parts // 4), requires_grad=False) for _ in range(parts)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + sum(part[0] for part in self.parts)


def fill_with_random_bits(parts: nn.ParameterList) -> None:
    """Every bit pattern, NaNs and infinities included, and no two parts the same: what comes back must be these."""
    bits = torch.randint(-(2**31), 2**31 - 1, (parts[0].numel(),), dtype=torch.int32)
    for index, part in enumerate(parts):
        part.detach().view(torch.int32).copy_(bits).bitwise_xor_(index)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_gibibyte_of_weights_goes_up_and_comes_down_bit_identical_past_a_small_frontend(client, frontend_pid):
    net = Ballast(GIB)
    fill_with_random_bits(net.parts)
    pushed = net.state_dict()
    with peak_growth_below(frontend_pid, 128 << 20):
        model = client.create_model(Ballast(GIB), loss="mse_loss", example=(torch.randn(2, 2), torch.randn(2, 1)))
        model.load_state_dict(pushed)
        pulled = model.state_dict()
        model.delete()
    assert pulled.keys() == pushed.keys()
    for name, tensor in pushed.items():
        assert torch.equal(pulled[name].view(torch.int32), tensor.view(torch.int32)), name
