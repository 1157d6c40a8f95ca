"""The baseline: the loop that everybody writes, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from benchmarks.networks import Network
from torch import Tensor, nn


class LocalLoop:
    """A network of its own that learns. device: where; batches come from the host, as a DataLoader's do."""

    def __init__(
        self, network: Network, device: str = "cpu", wrap: Callable[[nn.Module], nn.Module] = lambda net: net
    ) -> None:
        self._net = wrap(deepcopy(network.net).to(device))
        self._loss = network.loss
        self._optimizer = torch.optim.SGD(self._net.parameters(), lr=network.lr)
        # On the CPU even a `.to` that does nothing takes a hundredth of a small step.
        self._bring = (lambda batch: batch) if device == "cpu" else lambda batch: [each.to(device) for each in batch]

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        """One step; its loss, for which CUDA is waited."""
        inputs, targets = self._bring((inputs, targets))
        self._optimizer.zero_grad()
        loss = self._loss(self._net(inputs), targets)
        loss.backward()
        self._optimizer.step()
        return loss.item()
