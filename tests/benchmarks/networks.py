"""The two networks that are timed, and the models that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import gradwire
from gradwire import optim


@dataclass(frozen=True, kw_only=True)
class Network:
    """A module, its batch, its loss, and SGD's learning rate."""

    name: str
    net: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: nn.Module
    lr: float = 1e-3


def small() -> Network:
    """Little to compute: what is around it shows."""
    torch.manual_seed(0)
    return Network(
        name="small (10-5-1, batch 32)",
        net=nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1)),
        batch=(torch.randn(32, 10), torch.randn(32, 1)),
        loss=nn.MSELoss(),
    )


def medium(rows: int = 256) -> Network:
    """Some 20 ms of one core, and 7.1 MiB of gradients."""
    torch.manual_seed(0)
    return Network(
        name=f"medium (784-1024-1024-10, batch {rows})",
        net=nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)),
        batch=(torch.randn(rows, 784), torch.randint(0, 10, (rows,))),
        loss=nn.CrossEntropyLoss(),
    )


def create(client: gradwire.Client, network: Network, **options: Any) -> gradwire.Model:
    """A model of it. options: `workers`, `device` and others of `create_model`."""
    return client.create_model(
        network.net, loss=network.loss, optimizer=optim.SGD(lr=network.lr), example=network.batch, **options
    )
