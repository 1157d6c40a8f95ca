"""The derivative of x ** 2 at 5."""

import torch
from service import open_service

with open_service() as client:
    out, gradient = client.value_and_grad(lambda x: x**2)(torch.tensor(5.0))

print("out   ", out.item())
print("grad_x", gradient.item())
