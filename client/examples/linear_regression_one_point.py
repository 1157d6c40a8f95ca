"""A line fitted to one point: gradients of its weight and bias, and of the input itself."""

import torch
from service import open_service
from torch import nn

torch.manual_seed(0)
line = nn.Linear(1, 1)
x, y = torch.tensor([[2.0]]), torch.tensor([[4.0]])

with open_service() as client:
    model = client.create_model(line, loss=nn.MSELoss(), example=(x, y), workers=1)
    result = model.compute_gradients(x, y, input_gradients=True)
    model.delete()

# The same with local torch.
x.requires_grad_()
loss = nn.functional.mse_loss(line(x), y)
loss.backward()

print("          service    local torch")
print(f"loss      {result.loss:.6f}  {loss.item():.6f}")
for name, parameter in line.named_parameters():
    print(f"{name:9s} {result.gradients[name].item():.6f} {parameter.grad.item():.6f}")
print(f"x         {result.input_gradients.item():.6f} {x.grad.item():.6f}")
