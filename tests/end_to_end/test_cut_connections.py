"""A client whose connection is cut again and again trains as one that is left alone, bit for bit."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator

import pytest
import torch
from cutting_proxy import CuttingProxy
from torch import nn

import gradwire
from gradwire import optim

STEPS = 40


@pytest.fixture
def proxy(service: str) -> Iterator[CuttingProxy]:
    proxy = CuttingProxy(service)
    yield proxy
    proxy.close()


class Cutter:
    """Cuts a proxy's connections: soon, or in the midst of what passes next."""

    def __init__(self, proxy: CuttingProxy, seed: int) -> None:
        self._proxy = proxy
        self._random = random.Random(seed)

    def arm(self, *_: object) -> None:
        match self._random.randrange(3):
            case 0:
                threading.Timer(self._random.uniform(0, 0.02), self._proxy.cut).start()
            case 1:
                self._proxy.up_left = self._random.randrange(1, 6_000)
            case _:
                self._proxy.down_left = self._random.randrange(1, 200)


def made(client: gradwire.Client) -> gradwire.Model:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Dropout(0.2), nn.Linear(32, 4))
    return client.create_model(
        net,
        loss="mse_loss",
        optimizer=optim.Adam(lr=1e-2),
        example=(torch.randn(8, 16), torch.randn(8, 4)),
        workers=2,
    )


def test_training_over_a_connection_that_is_cut_is_that_over_one_that_is_not(client, proxy):
    torch.manual_seed(4)
    batches = [(torch.randn(64, 16), torch.randn(64, 4)) for _ in range(STEPS)]
    calm, cut = made(client), made(client)
    expected = [calm.train_step(*batch).loss for batch in batches]
    cutter, results = Cutter(proxy, seed=5), []
    with gradwire.connect(proxy.target, shared_memory=False) as disturbed:
        model = disturbed.get_model(cut.id)
        for batch in batches[:20]:
            cutter.arm()
            results.append(model.train_step(*batch))
        # And with many that wait for their turn.
        futures = [model.futures.train_step(*batch) for batch in batches[20:]]
        for future in futures:
            future.add_done_callback(cutter.arm)
        results += [future.result(60) for future in futures]
        proxy.up_left = proxy.down_left = None
    assert proxy.cuts >= 15
    assert [result.step for result in results] == list(range(1, STEPS + 1))
    assert [result.loss for result in results] == expected
    after, as_expected = cut.state_dict(), calm.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in as_expected.items())


def test_tensors_of_many_megabytes_go_up_and_come_down_over_a_connection_that_is_cut(client, proxy):
    net = nn.Linear(1500, 1500)
    model = client.create_model(net, loss="mse_loss", example=(torch.zeros(2, 1500), torch.zeros(2, 1500)))
    weights = {"weight": torch.randn(1500, 1500), "bias": torch.randn(1500)}
    with gradwire.connect(proxy.target, shared_memory=False) as disturbed:
        far = disturbed.get_model(model.id)
        proxy.up_left = 3 << 20
        far.load_state_dict(weights)
        assert proxy.up_left is None, "nothing was cut"
        proxy.down_left = 3 << 20
        received = far.state_dict()
        assert proxy.down_left is None, "nothing was cut"
    assert all(torch.equal(received[name], tensor) for name, tensor in weights.items())
