"""What torch does only at first use: seconds that a waiting process can spend before anybody waits for it."""

from __future__ import annotations

import importlib

LAZY_MODULES = ("torch._dynamo.utils", "torch.distributed.optim")
"""What the first DistributedDataParallel and the first optimizer import."""


def warm_up() -> None:
    """Import those modules and take a first step. Takes 1 to 4 s, and milliseconds where they are imported."""
    for module in LAZY_MODULES:
        importlib.import_module(module)
    import torch
    from torch import nn

    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.5)
    layer(torch.zeros(1, 1)).sum().backward()
    optimizer.step()
