"""What a rank's step has freed is there for the next one: it asks the system for no memory."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch
from torch import nn

from gradwire import optim

STEPS = 20


def new_pages() -> int:
    """How many pages all ranks together have been given so far."""
    pages = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] == ["ray::RankActor"]:
                status = Path(f"/proc/{process.pid}/stat").read_text()
                pages += int(status.rpartition(")")[2].split()[7])
        except (psutil.Error, OSError):
            continue
    return pages


def test_steps_take_no_new_pages(client, service_processes):
    net = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    x, y = torch.randn(256, 784), torch.randint(0, 10, (256,))
    model = client.create_model(net, loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=1e-3), example=(x, y))
    for _ in range(STEPS):
        model.train_step(x, y)
    # Ranks that start take pages of their own.
    service_processes(settled=True)
    before = new_pages()
    for _ in range(STEPS):
        model.train_step(x, y)
    # Its gradients alone have 1,800; with glibc's own thresholds it takes as many anew.
    assert (new_pages() - before) / STEPS < 300
