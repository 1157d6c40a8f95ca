"""Copies between host and device: none on the CPU, and what CUDA is asked for, looked at without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gradwire_workers import device_copies
from gradwire_workers.device_copies import on_host, to_device

CUDA = torch.device("cuda", 0)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class OnCuda(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]
    device = CUDA  # type: ignore[assignment]


class Calls(list[str]):
    """What was asked of torch, in order."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """torch, which writes down what is asked of CUDA and does it on the CPU."""
    calls, empty, copy = Calls(), torch.empty, Tensor.copy_

    class Event:
        def record(self, stream: Any) -> None:
            self.number = sum(each.startswith("record") for each in calls)
            calls.append(f"record {stream}")

        def synchronize(self) -> None:
            calls.append(f"wait {self.number}")

    def to(tensor: Tensor, device: Any, *, non_blocking: bool = False) -> Tensor:
        calls.append(f"to {device}{' later' if non_blocking else ''}")
        return tensor

    def copied(into: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        calls.append(f"copy {source.numel()}{' later' if non_blocking else ''}")
        return copy(into, source.as_subclass(Tensor))

    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: calls.append("lock") or tensor.clone())
    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: calls.append("cpu") or tensor)
    monkeypatch.setattr(Tensor, "copy_", copied)
    monkeypatch.setattr(torch, "empty", lambda shape, pin_memory, **more: calls.append("room") or empty(shape, **more))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    return calls


def test_on_the_cpu_every_tensor_stays_what_it_is() -> None:
    tensors = [torch.randn(3), torch.empty(0), torch.randn(2, 2).t()]
    assert all(to_device(each, torch.device("cpu")) is each for each in tensors)
    assert all(found is each for found, each in zip(on_host(iter(tensors)), tensors, strict=True))


def test_a_batch_goes_to_cuda_through_locked_memory_and_nobody_waits(calls: Calls) -> None:
    batch = torch.arange(3.0)
    moved = to_device(batch, CUDA)
    batch.zero_()  # a message's memory, or a buffer of rows, is used again at once
    assert moved.tolist() == [0.0, 1.0, 2.0]
    assert calls == ["lock", "to cuda:0 later"]


def test_what_is_on_cuda_already_or_larger_than_is_locked_goes_as_torch_does_it(calls, monkeypatch) -> None:
    monkeypatch.setattr(device_copies, "LOCKED_BYTES", 8)
    to_device(torch.ones(3), CUDA)
    to_device(torch.ones(1).as_subclass(OnCuda), CUDA)
    assert next(on_host([torch.ones(3).as_subclass(OnCuda)])).tolist() == [1.0] * 3
    assert calls == ["to cuda:0", "to cuda:0", "cpu"]


def test_tensors_come_from_cuda_several_at_once_and_each_is_waited_for_before_it_is_used(calls, monkeypatch) -> None:
    monkeypatch.setattr(device_copies, "LOCKED_BYTES", 16)
    tensors = [torch.full((count,), float(count)) for count in (1, 2, 3, 4)]
    found = on_host(each.as_subclass(OnCuda) for each in tensors)
    seen = []
    for each in found:
        seen.append(each.tolist())
        calls.append("used")
    assert seen == [each.tolist() for each in tensors]
    begun = [f"room copy {count} later record stream of cuda:0" for count in (1, 2, 3, 4)]
    assert " ".join(calls) == (
        # 4 and 8 bytes are on their way before the third, of 12, makes them wait for the first.
        f"{begun[0]} {begun[1]} {begun[2]} wait 0 used wait 1 used {begun[3]} wait 2 used wait 3 used"
    )


@needs_cuda
def test_bytes_arrive_on_a_gpu_and_back() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(count, generator=generator) for count in (0, 1, 1000, 3_000_000)]
    tensors += [torch.randn(300, 500, generator=generator).t(), torch.tensor(7), torch.rand(9) > 0.5]
    moved = []
    for each in tensors:
        source = each.clone()
        moved.append(to_device(source, CUDA))
        source.zero_()
    assert all(each.is_cuda for each in moved)
    assert all(map(torch.equal, on_host(moved), tensors))
