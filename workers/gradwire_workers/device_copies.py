"""Copies between host and device. A CUDA device reads and writes page-locked memory alone, while the rank goes on.

What is on the CPU and stays there is not touched: the same tensors come out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

LOCKED_BYTES = 64 << 20
"""The largest tensor that goes through page-locked memory, and what of it may be on its way to the host at a time.

torch keeps such memory for the next time, and nobody else can have it.
"""


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; itself where it is there already.

    On CUDA it may still be on its way: what is computed with it waits on the device, nobody here does. The tensor that
    was given may change at once.
    """
    if device.type != "cuda" or tensor.is_cuda or tensor.nbytes > LOCKED_BYTES:
        return tensor.to(device)
    # torch gives the page-locked copy to nobody else before it has been read.
    return tensor.pin_memory().to(device, non_blocking=True)


def on_host(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors on the CPU, in order; themselves where they are there already.

    Those on CUDA come several at once: the next ones are on their way while one is used.
    """
    coming: deque[tuple[Tensor, Any]] = deque()
    nbytes = 0
    for tensor in tensors:
        coming.append(_begun(tensor))
        nbytes += tensor.nbytes
        while nbytes > LOCKED_BYTES:
            arrived = _arrived(*coming.popleft())
            nbytes -= arrived.nbytes
            yield arrived
    for each in coming:
        yield _arrived(*each)


def _begun(tensor: Tensor) -> tuple[Tensor, Any]:
    """(the tensor on the CPU, the event at which it has its values); no event where it has them."""
    if not tensor.is_cuda or tensor.layout is not torch.strided:
        return tensor, None
    if tensor.nbytes > LOCKED_BYTES:
        return tensor.cpu(), None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor.detach(), non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


def _arrived(host: Tensor, event: Any) -> Tensor:
    if event is not None:
        event.synchronize()
    return host
