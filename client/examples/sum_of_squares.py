"""The gradient of sum(x ** 2), a function without a model: 2 * x."""

import torch
from service import open_service

x = torch.tensor([[2.0, -1.0], [1.0, 1.0]])

with open_service() as client:
    out, gradient = client.value_and_grad(lambda x: (x**2).sum())(x)

print("out   ", out.item())
print("grad_x", gradient.tolist())
