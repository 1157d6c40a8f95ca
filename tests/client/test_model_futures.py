"""Calls of a model that return at once: their order, their errors, and their end."""

from __future__ import annotations

import asyncio
import threading

import pytest
import torch
from client.one_model import FEATURES, RESULT, batch, net, sent
from torch.utils.data import DataLoader, TensorDataset

import gradwire
from gradwire import errors, optim
from gradwire_proto import codec
from gradwire_proto.tensors import to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb


def test_forked_data_loader_workers_run_beside_a_client_with_calls_in_flight(model, scripted):
    x, y = batch(32)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, num_workers=2, multiprocessing_context="fork")
    futures = []
    for _ in range(2):
        for inputs, targets in loader:
            futures.append(model.futures.train_step(inputs, targets))
            model.info()
    assert [future.result(5) for future in futures] == [RESULT] * 16
    received = [codec.decode_batch(request.batch).inputs for request in scripted.requests("TrainStep")]
    assert torch.equal(torch.cat([to_torch(inputs) for inputs in received]), torch.cat([x, x]))


def test_futures_run_in_the_order_of_the_calls_and_a_blocking_call_waits_for_them(model, scripted):
    order = []

    def slow_step(request, context):
        scripted.release.wait(0.05)
        order.append(request.learning_rate)
        return pb.TrainStepResponse(result=codec.encode_step_result(RESULT))

    scripted.answers["TrainStep"] = slow_step
    x, y = batch()
    futures = [model.futures.train_step(x, y, lr=float(number)) for number in range(1, 5)]
    model.train_step(x, y, lr=5.0)
    assert order == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [future.result(1) for future in futures] == [RESULT] * 4


def test_what_a_future_was_given_may_change_at_once(model, scripted):
    x, y = batch()
    before = x.clone()
    future = model.futures.train_step(x, y)
    x.zero_()
    future.result(5)
    assert torch.equal(to_torch(codec.decode_batch(sent(scripted, "TrainStep").batch).inputs), before)


def test_future_of_a_bad_call_raises_its_error_and_others_go_on(model):
    bad = model.futures.train_step(torch.randn(6, FEATURES + 1), batch()[1])
    good = model.futures.train_step(*batch())
    with pytest.raises(errors.InvalidArgument):
        bad.result(5)
    assert good.result(5) == RESULT


async def test_futures_can_be_awaited(model):
    x, y = batch()
    step, info = await asyncio.gather(model.futures.train_step(x, y), model.futures.info())
    assert step == RESULT and info.id == "mine"
    assert await model.futures.zero_grad() is None


def test_closing_the_client_gives_up_futures_that_were_not_sent(scripted, hosted):
    sdk = gradwire.connect(scripted.target, timeout=5)
    model = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(), example=batch())
    started = threading.Event()
    scripted.answers["TrainStep"] = lambda request, context: started.set() or scripted.release.wait(10)
    running, waiting = model.futures.train_step(*batch()), model.futures.train_step(*batch())
    assert started.wait(5)
    sdk.close()
    with pytest.raises(errors.Cancelled) as caught:
        waiting.result(5)
    assert caught.value.outcome == "not_applied"
    with pytest.raises(errors.Cancelled) as caught:
        running.result(5)
    assert caught.value.outcome == "unknown"
