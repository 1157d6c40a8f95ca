"""Batches that the example did not foresee: other lengths, constants and modes run as in torch, unseen by the user."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import gradwire
from gradwire import optim


class Tagger(nn.Module):
    """An LSTM over tokens: its length is fixed in a graph. Takes its inputs by name and returns a dict."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.out = nn.Linear(8, 5)

    def forward(self, tokens, scale=1.0):
        hidden, _ = self.lstm(self.embedding(tokens))
        return {"logits": self.out(hidden) * scale, "hidden": hidden}


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), targets.flatten())


def batch(rows: int, length: int, **constants):
    return {"tokens": torch.randint(0, 20, (rows, length)), **constants}, torch.randint(0, 5, (rows, length))


def test_every_length_and_constant_trains_and_predicts_as_local_torch(client: gradwire.Client):
    torch.manual_seed(2)
    net = Tagger().double()
    local = copy.deepcopy(net)
    optimizer = torch.optim.SGD(local.parameters(), lr=0.1, momentum=0.9)
    model = client.create_model(
        net, loss=loss, optimizer=optim.SGD(lr=0.1, momentum=0.9), example=batch(4, 6), workers=2
    )
    variants = len(model.info().variants)
    for rows, length, constants in ((4, 6, {}), (3, 9, {}), (5, 9, {}), (1, 6, {}), (4, 6, {"scale": 2.0})):
        inputs, targets = batch(rows, length, **constants)
        optimizer.zero_grad()
        expected = loss(local(**inputs), targets)
        expected.backward()
        optimizer.step()
        result = model.train_step(inputs, targets)
        assert result.loss == pytest.approx(expected.item(), rel=1e-10)
        assert sum(result.rank_rows) == rows and (rows == 1 or 0 not in result.rank_rows)
        outputs = model(inputs)
        for name, tensor in local(**inputs).items():
            torch.testing.assert_close(outputs[name], tensor.detach(), rtol=1e-9, atol=1e-10)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, local.state_dict()[name], rtol=1e-9, atol=1e-10)
    # Two more for training, two more for prediction; and no other for what was seen before.
    assert len(model.info().variants) == variants + 4
    # Another client, without the module, uses what is there.
    found = client.get_model(model.id)
    inputs, targets = batch(7, 9)
    assert found.train_step(inputs, targets).loss == pytest.approx(loss(local(**inputs), targets).item(), rel=1e-10)


class Alone(nn.Module):
    """Does another thing with a row that is alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x) * (3 if x.shape[0] == 1 else 1)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_single_row_that_the_module_treats_otherwise_has_a_graph_of_its_own(client: gradwire.Client, rows: int):
    net = Alone().double()
    example = torch.randn(rows, 3).double(), torch.randn(rows, 1).double()
    model = client.create_model(net, loss=nn.MSELoss(), example=example, workers=2)
    for count in (1, 4, 2, 1):
        x, y = torch.randn(count, 3).double(), torch.randn(count, 1).double()
        expected = nn.functional.mse_loss(net(x), y).item()
        assert model.compute_gradients(x, y).loss == pytest.approx(expected, rel=1e-10)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("first", [0, 1])
def test_targets_that_are_broadcast_and_such_that_are_not_fit_one_model(client: gradwire.Client, first: int):
    net = nn.Linear(3, 1).double()
    x = torch.randn(6, 3).double()
    both = [torch.randn(6, 1).double(), torch.randn(6).double()]
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, both[first]), workers=2)
    for y in (both[first], both[1 - first]):
        expected = nn.functional.mse_loss(net(x), y).item()
        assert model.compute_gradients(x, y).loss == pytest.approx(expected, rel=1e-10)
