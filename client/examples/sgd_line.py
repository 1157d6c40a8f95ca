"""A line through noisy points, from a bad start: the service and local torch, step by step."""

import torch
from service import open_service
from torch import nn

from gradwire import optim


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-10.0))
        self.b = nn.Parameter(torch.tensor(-20.0))

    def forward(self, x):
        return self.w * x + self.b


torch.manual_seed(0)
x = torch.arange(-5, 5, 0.1).unsqueeze(1)
y = -5 * x + 0.4 * torch.randn_like(x)
line = Line()
local = torch.optim.SGD(line.parameters(), lr=0.1)

with open_service() as client:
    model = client.create_model(line, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=(x, y), workers=2)
    for step in range(30):
        remote = model.compute_gradients(x, y)
        model.train_step(x, y)

        local.zero_grad()
        loss = nn.functional.mse_loss(line(x), y)
        loss.backward()
        if step % 5 == 0:
            print(f"step {step:2d}  service: loss {remote.loss:10.5f}", end="  ")
            print(*(f"d{name} {gradient.item():10.5f}" for name, gradient in remote.gradients.items()))
            print(f"           local:   loss {loss.item():10.5f}  ", end="")
            print(*(f"d{name} {parameter.grad.item():10.5f}" for name, parameter in line.named_parameters()))
        local.step()
    weights = model.state_dict()
    model.delete()

print(f"w {weights['w'].item():.4f} (near -5), b {weights['b'].item():.4f} (near 0)")
print(f"local w {line.w.item():.4f}, b {line.b.item():.4f}")
