"""PyTorch's own training loop over a model on the service: two lines differ, the weights are those of local torch."""

import copy

import torch
from service import open_service
from torch import nn

from gradwire import optim

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
x, y = torch.randn(60, 4), torch.randint(3, (60,))
criterion = nn.CrossEntropyLoss()


def train(model, optimizer):
    loss = torch.zeros(())
    for _ in range(5):
        for inputs, targets in zip(x.split(16), y.split(16), strict=True):
            optimizer.zero_grad()
            loss = criterion(model(inputs), targets)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return loss.item()


local = copy.deepcopy(net)
here = train(local, torch.optim.SGD(local.parameters(), lr=0.1))

with open_service() as client:
    remote = client.create_model(net, optimizer=optim.SGD(lr=0.1), example=(x,), workers=2)
    model, optimizer = remote.as_module(), remote.as_optimizer()
    there = train(model, optimizer)
    weights = model.state_dict()
    remote.delete()

difference = max((weights[name] - value).abs().max().item() for name, value in local.state_dict().items())
print(f"loss here {here:.4f}, on the service {there:.4f}")
print("weights agree to 1e-5" if difference < 1e-5 else f"weights differ by {difference}")
