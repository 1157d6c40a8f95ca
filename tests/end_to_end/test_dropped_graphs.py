"""Forwards that the service retains for a module here: freed when their graph is dropped, and not before."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from end_to_end.local_twin import Pair, batch

from gradwire import retained_releases
from gradwire.deadline import Deadline
from gradwire.errors import FailedPrecondition, InvalidArgument
from gradwire_proto.values import BackwardQuery


@pytest.fixture
def collects_nothing() -> Iterator[None]:
    """Python's collector does not run: what is freed is freed because nothing refers to it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("collects_nothing")
def test_graphs_that_are_dropped_are_freed_although_nothing_else_is_called(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    outputs = [pair.remote(batch()[0]) for _ in range(3)]
    query = BackwardQuery(retained=outputs[0].grad_fn.step.name, keep=True)
    del outputs
    cotangents = [torch.ones(7, 3, dtype=torch.float64)]

    def is_gone() -> bool:
        try:
            pair.model._autograd.backward(query, cotangents, Deadline(10.0)).run(pair.model._rpc)
        except FailedPrecondition as error:
            return error.reason == "RETAINED_GONE"
        return False

    deadline = time.monotonic() + 5.0  # long before they would expire
    while not is_gone():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("collects_nothing")
def test_a_forward_takes_the_place_of_one_that_was_just_dropped(make_pair: Callable[..., Pair]) -> None:
    pair = make_pair()
    out = pair.remote(batch()[0])
    name = out.grad_fn.step.name
    del out
    assert pair.remote._releases.take() == [name]


def test_a_backward_that_is_refused_for_its_cotangents_leaves_the_forward(make_pair: Callable[..., Pair]) -> None:
    torch.manual_seed(14)
    pair = make_pair()
    x, _ = batch()
    outputs = [net(x) for net, _ in pair.both]
    wrong = [torch.ones(7, 4, dtype=torch.float64)]
    query = BackwardQuery(retained=outputs[0].grad_fn.step.name)
    with pytest.raises(InvalidArgument) as caught:
        pair.model._autograd.backward(query, wrong, Deadline(10.0)).run(pair.model._rpc)
    assert (caught.value.field, caught.value.reason) == ("cotangents[0]", "COTANGENT_MISMATCH")
    for output in outputs:
        output.sum().backward()
    pair.assert_same_gradients()


def test_what_a_refused_forward_was_to_release_is_released_by_another(
    make_pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retained_releases, "_GATHER_SECONDS", 5.0)  # the thread that sends them stays out of it
    pair = make_pair()
    out = pair.remote(batch()[0])
    name = out.grad_fn.step.name
    del out
    with pytest.raises(InvalidArgument):
        pair.remote(torch.randn(0, 4).double())
    assert pair.remote._releases.take() == [name]
