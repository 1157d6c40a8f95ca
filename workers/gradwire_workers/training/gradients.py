"""Gradients of all ranks, added up: overlapped with backward by DDP, or all at once."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gradwire_workers.process_group import ProcessGroups


class SummingModule:
    """A module whose backward leaves the sum of all ranks' gradients in `.grad`; None where no rank has one.

    torch's DistributedDataParallel, which averages, made to add up. After a failure, `drop` it and make another.
    """

    def __init__(self, module: nn.Module, groups: ProcessGroups) -> None:
        self._groups = groups
        self._last_bucket_left = 0.0
        # Replicas are equal already. With unused parameters looked for, buckets are never rebuilt: the order in which
        # gradients are added up, and so every bit of them, stays the same after a recovery.
        with warnings.catch_warnings():
            # The new name for `broadcast_buffers` came after the oldest torch that is supported.
            warnings.simplefilter("ignore", FutureWarning)
            self._module = DistributedDataParallel(
                module, broadcast_buffers=False, find_unused_parameters=True, init_sync=False, process_group=groups.main
            )
        self._module.register_comm_hook(None, self._add_up)

    def __call__(self, *arguments: object) -> Tensor:
        return self._module(*arguments)

    def backward(self, loss: Tensor, cotangent: Tensor) -> float:
        """Run backward. Returns the seconds spent waiting for other ranks after the last gradient was there."""
        loss.backward(cotangent)
        return perf_counter() - self._last_bucket_left

    def drop(self) -> None:
        """Let go of the process group and of the parameters: old ones would go on adding up gradients."""
        self._module._remove_autograd_hooks()
        self._module.reducer = self._module.logger = self._module.process_group = None  # type: ignore[assignment]

    # Without annotations: DDP compares them, and does not know them as strings.
    def _add_up(self, _, bucket):
        self._last_bucket_left = perf_counter()
        return self._groups.start_all_reduce(bucket.buffer())


def apart(gradients: Sequence[Tensor | None], like: Sequence[Tensor], *, copy: bool) -> list[Tensor | None]:
    """The gradients, each in memory of its own and laid out as what it belongs to, as `backward()` leaves them.

    Whoever changes one in place, as clipping does, must not change others. copy: what they are made of is not known: a
    custom function may hand out what it has saved, a parameter or the batch itself.
    """
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for gradient, tensor in zip(gradients, like, strict=True):
        if gradient is not None:
            memory = gradient.untyped_storage().data_ptr()
            if copy or memory in seen or gradient.stride() != tensor.stride():
                gradient = torch.empty_like(tensor, requires_grad=False).copy_(gradient)
            seen.add(memory)
        found.append(gradient)
    return found


def share_memory(tensors: Sequence[Tensor | None]) -> bool:
    """Whether two of them may be in the same memory."""
    seen = {0}
    for each in tensors:
        if each is not None:
            start = each.data_ptr()
            if start in seen or each.storage_offset():
                return True
            seen.add(start)
    return False


def add_up(gradients: Sequence[Tensor | None], like: Sequence[Tensor], groups: ProcessGroups) -> list[Tensor | None]:
    """The sum of all ranks' gradients, as new tensors; None where no rank has one.

    like: tensors of the gradients' shapes and types. One collective for each type.
    """
    if not like:
        return []
    present = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.uint8)
    groups.all_reduce(present, largest=True)
    wanted = [index for index, is_there in enumerate(present.tolist()) if is_there]
    filled = [torch.zeros_like(spec) if each is None else each for each, spec in zip(gradients, like, strict=True)]
    total: list[Tensor | None] = [None] * len(like)
    for indices, flat in _flattened([filled[index] for index in wanted], wanted):
        groups.all_reduce(flat)
        for index, part in zip(indices, flat.split([like[index].numel() for index in indices]), strict=True):
            total[index] = part.view(like[index].shape)
    return total


def broadcast(tensors: Sequence[Tensor], groups: ProcessGroups) -> list[Tensor]:
    """Rank 0's values of these tensors, as new tensors: theirs do not change."""
    received: list[Tensor] = list(tensors)
    for indices, flat in _flattened(tensors, range(len(tensors))):
        groups.broadcast(flat.view(torch.uint8))  # gloo does not know every type
        for index, part in zip(indices, flat.split([tensors[index].numel() for index in indices]), strict=True):
            received[index] = part.view(tensors[index].shape)
    return received


def _flattened(tensors: Sequence[Tensor], indices: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
    """(indices, the tensors at them copied into one) for each type."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        chosen = [(index, tensor) for index, tensor in zip(indices, tensors, strict=True) if tensor.dtype is dtype]
        yield [index for index, _ in chosen], torch.cat([tensor.detach().reshape(-1) for _, tensor in chosen])
