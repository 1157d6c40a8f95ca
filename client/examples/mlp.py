"""A small MLP on one random row: the gradients of its four parameters, next to local torch's."""

import torch
from service import open_service
from torch import nn

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))
x, y = torch.randn(1, 10), torch.randn(1, 1)

with open_service() as client:
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), workers=2)
    result = model.compute_gradients(x, y)
    model.delete()

loss = nn.functional.mse_loss(net(x), y)
loss.backward()

print(f"loss {result.loss:.6f}, local {loss.item():.6f}")
for name, parameter in net.named_parameters():
    difference = (result.gradients[name] - parameter.grad).abs().max().item()
    print(f"{name:8s} {tuple(parameter.shape)!s:8s} largest difference from local torch {difference:.1e}")
