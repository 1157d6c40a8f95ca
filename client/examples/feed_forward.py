"""One hidden layer with its weights written out: loss, the four gradients, and the weights after one SGD update."""

import torch
from service import open_service
from torch import nn

from gradwire import optim


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.W0 = nn.Parameter(torch.tensor([[-0.0053, -0.5820, -0.2723], [0.3793, -0.5204, 0.1896]]))
        self.W1 = nn.Parameter(torch.tensor([-0.0140, 0.5607, -0.0628]))
        self.W2 = nn.Parameter(torch.tensor([[0.1528], [-0.1745], [-0.1135]]))
        self.W3 = nn.Parameter(torch.tensor([-0.5516]))

    def forward(self, x):
        # W1 is added to every row of W0: the case is defined so.
        hidden = torch.sigmoid(x @ (self.W0 + self.W1))
        return hidden @ self.W2 + self.W3


x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0]])

with open_service() as client:
    model = client.create_model(
        FeedForward(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=1.0), example=(x, y), workers=2
    )
    result = model.compute_gradients(x, y)
    model.train_step(x, y)
    updated = model.state_dict()
    model.delete()


def rounded(tensor):
    """Nested lists of four decimals, as text."""
    if tensor.dim() == 0:
        return f"{tensor.item():.4f}"
    return f"[{', '.join(map(rounded, tensor))}]"


print(f"loss {result.loss:.4f}")
for name, gradient in result.gradients.items():
    print("grad", name, rounded(gradient))
for name, weight in updated.items():
    print("updated", name, rounded(weight))
