"""Many clients and many models at once, and many one after another."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim


def train_remotely_and_locally(target: str, seed: int) -> None:
    """One client with a connection of its own trains a model of its own; local torch does the same on the same data."""
    generator = torch.Generator().manual_seed(seed)
    width = 3 + seed
    net = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))
    batches = [(torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)) for _ in range(10)]
    with gradwire.connect(target) as client:
        model = client.create_model(
            net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.05, momentum=0.9), example=batches[0], workers=1
        )
        losses = [model.train_step(x, y).loss for x, y in batches]
        state = model.state_dict()
        model.delete()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for (x, y), remote in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(x), y)
        loss.backward()
        optimizer.step()
        assert remote == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-5, atol=1e-6)


def test_eight_clients_train_eight_models_at_once_and_each_equals_local_torch(service):
    torch.manual_seed(0)
    with ThreadPoolExecutor(8) as pool:
        for outcome in [pool.submit(train_remotely_and_locally, service, seed) for seed in range(8)]:
            outcome.result(timeout=60)


def usage(service_pids: set[int]) -> dict[str, int]:
    """Processes, open files and shared-memory files of the service, for comparing before and after."""
    processes = [psutil.Process(pid) for pid in service_pids if psutil.pid_exists(pid)]
    return {
        "processes": len(processes),
        "descriptors": sum(process.num_fds() for process in processes),
        "shared memory files": sum(len(files) for *_, files in os.walk(memory_folder(processes))),
    }


def memory_folder(processes: list[psutil.Process]) -> str:
    """Where this service shares memory: other services on the machine have folders of their own."""
    option = "--shared-memory-dir="
    words = [word for process in processes for word in process.cmdline() if word.startswith(option)]
    (folder,) = {word.removeprefix(option) for word in words}
    assert folder.startswith("/dev/shm/") and os.path.isdir(folder)
    return folder


@pytest.mark.slow
def test_twenty_models_made_and_deleted_in_a_row_leave_no_trace(client, service_processes):
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    example = (torch.randn(6, 4), torch.randn(6, 2))

    def one_life() -> None:
        model = client.create_model(net, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=example, workers=2)
        model.train_step(*example)
        model.delete()

    for _ in range(3):
        one_life()
    before = usage(service_processes(settled=True))
    for _ in range(20):
        one_life()
    after = usage(service_processes(settled=True))
    assert after["processes"] <= before["processes"]
    assert after["shared memory files"] <= before["shared memory files"]
    # Ray's own processes open and close a few sockets at will.
    assert after["descriptors"] <= before["descriptors"] + 10, (before, after)
