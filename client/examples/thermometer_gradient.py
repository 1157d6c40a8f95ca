"""An unknown thermometer's scale, one gradient: w and b live in one tensor, and the inputs are not scaled."""

import torch
from service import open_service

t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
t_u = torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])


def loss(params, t_u, t_c):
    w, b = params
    return ((w * t_u + b - t_c) ** 2).mean()


with open_service() as client:
    value, gradient = client.value_and_grad(loss)(torch.tensor([1.0, 0.0]), t_u, t_c)

print(f"loss {value.item():.4f}")
print("grad", *(f"{part:.4f}" for part in gradient.tolist()))
