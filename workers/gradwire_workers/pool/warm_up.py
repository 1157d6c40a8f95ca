"""What torch imports only at first use: seconds that a waiting process can spend before anybody waits for it."""

from __future__ import annotations


def warm_up() -> None:
    """Import what the first DistributedDataParallel and the first optimizer import. Takes 1 to 4 s, once."""
    import torch
    import torch._dynamo.utils
    import torch.distributed.optim
    from torch import nn

    layer = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.5)
    layer(torch.zeros(1, 1)).sum().backward()
    optimizer.step()
