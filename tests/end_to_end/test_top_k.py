"""Gradients of which only the largest elements travel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors


class Network(nn.Module):
    """With a parameter of no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 300), nn.Linear(300, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(50, 40), torch.randn(50, 3)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Network()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sparse_gradients_are_the_largest_elements_of_the_dense_ones(client, net, workers, dtype):
    model = client.create_model(net, loss="mse_loss", example=batch(), workers=workers)
    dense = model.compute_gradients(*batch(), dtype=dtype)
    result = model.futures.compute_gradients(*batch(), dtype=dtype, top_k=0.05).result(60)
    assert result.loss == dense.loss and result.gradients.keys() == dense.gradients.keys()
    nn.functional.mse_loss(net(batch()[0]), batch()[1]).backward()
    for name, parameter in net.named_parameters():
        sparse, whole = result.gradients[name], dense.gradients[name]
        count = max(1, round(0.05 * whole.numel()))
        assert sparse.is_sparse and sparse.is_coalesced() and sparse._nnz() == count
        assert (sparse.dtype, sparse.shape) == (whole.dtype, parameter.shape)
        chosen = sparse.to_dense()
        assert torch.equal(chosen, torch.where(chosen != 0, whole, 0))
        assert torch.equal(chosen.abs().view(-1).topk(count).values, whole.abs().view(-1).topk(count).values)
        if dtype is None:
            assert parameter.grad is not None
            torch.testing.assert_close(chosen, torch.where(chosen != 0, parameter.grad, 0))


def test_large_ones_travel_apart_and_are_the_same_either_way(client, service):
    net = nn.Linear(1200, 1200)
    x, y = torch.randn(64, 1200), torch.randn(64, 1200)
    model = client.create_model(net, loss="mse_loss", example=(x, y))
    shared = model.compute_gradients(x, y, top_k=0.5).gradients["weight"]
    with gradwire.connect(service, shared_memory=False) as other:
        streamed = other.get_model(model.id).compute_gradients(x, y, top_k=0.5).gradients["weight"]
    assert torch.equal(shared.indices(), streamed.indices()) and torch.equal(shared.values(), streamed.values())
    net(x).sub(y).square().mean().backward()
    assert net.weight.grad is not None
    torch.testing.assert_close(shared.values(), net.weight.grad[tuple(shared.indices())])


@pytest.mark.parametrize("top_k", [0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_fraction_that_is_none_is_refused(client, net, top_k):
    model = client.create_model(net, loss="mse_loss", example=batch())
    with pytest.raises(errors.InvalidArgument) as caught:
        model.compute_gradients(*batch(), top_k=top_k)
    assert caught.value.field == "top_k"
