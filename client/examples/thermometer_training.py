"""An unknown thermometer's scale, 5,000 epochs of plain SGD, each one call of the service."""

import torch
from service import open_service
from torch import nn

from gradwire import optim

t_c = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
t_un = 0.1 * torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])


class Thermometer(nn.Module):
    def __init__(self):
        super().__init__()
        self.params = nn.Parameter(torch.tensor([1.0, 0.0]))

    def forward(self, t_u):
        w, b = self.params
        return w * t_u + b


with open_service() as client:
    model = client.create_model(
        Thermometer(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=1e-2), example=(t_un, t_c), workers=1
    )
    for epoch in range(1, 5001):
        if epoch % 500 == 0:
            gradient = model.compute_gradients(t_un, t_c).gradients["params"].tolist()
            print(f"epoch {epoch} grad {gradient[0]:.4e} {gradient[1]:.4e}", end=" ")
        result = model.train_step(t_un, t_c)
        if epoch % 500 == 0:
            print(f"loss {result.loss:.6f}")
    params = model.state_dict()["params"].tolist()
    model.delete()

print(f"params {params[0]:.4f} {params[1]:.4f}")
