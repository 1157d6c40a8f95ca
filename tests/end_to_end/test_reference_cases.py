"""Results known from elsewhere, to the printed digits, through the service."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gradwire import optim

T_C = torch.tensor([0.5, 14.0, 15.0, 28.0, 11.0, 8.0, 3.0, -4.0, 6.0, 13.0, 21.0])
T_U = torch.tensor([35.7, 55.9, 58.2, 81.9, 56.3, 48.9, 33.9, 21.8, 48.4, 60.4, 68.4])


def test_gradient_of_the_sum_of_squares(client):
    x = torch.tensor([[2.0, -1.0], [1.0, 1.0]])
    out, gradient = client.value_and_grad(lambda x: (x**2).sum())(x)
    assert out.item() == 7.0
    assert gradient.tolist() == [[4.0, -2.0], [2.0, 2.0]]


def test_derivative_of_the_square_at_five(client):
    out, gradient = client.value_and_grad(lambda x: x**2)(torch.tensor(5.0))
    assert (out.item(), gradient.item()) == (25.0, 10.0)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W0 = nn.Parameter(torch.tensor([[-0.0053, -0.5820, -0.2723], [0.3793, -0.5204, 0.1896]]))
        self.W1 = nn.Parameter(torch.tensor([-0.0140, 0.5607, -0.0628]))
        self.W2 = nn.Parameter(torch.tensor([[0.1528], [-0.1745], [-0.1135]]))
        self.W3 = nn.Parameter(torch.tensor([-0.5516]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(x @ (self.W0 + self.W1)) @ self.W2 + self.W3


@pytest.mark.parametrize("workers", [1, 2])
def test_feed_forward_network_with_explicit_weights(client, workers):
    x, y = torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0]])
    model = client.create_model(
        FeedForward(), loss=nn.MSELoss(), optimizer=optim.SGD(lr=1.0), example=(x, y), workers=workers
    )
    result = model.compute_gradients(x, y)
    gradients = {
        "W0": [[-0.0446, 0.0524, 0.0337], [-0.0446, 0.0524, 0.0337]],
        "W1": [-0.0891, 0.1049, 0.0675],
        "W2": [[-0.7040], [-0.6068], [-0.5387]],
        "W3": [-1.2021],
    }
    updated = {
        "W0": [[0.0393, -0.6344, -0.3060], [0.4239, -0.5728, 0.1559]],
        "W1": [0.0751, 0.4558, -0.1303],
        "W2": [[0.8568], [0.4323], [0.4252]],
        "W3": [0.6505],
    }
    assert result.loss == pytest.approx(0.3613, abs=1e-4)
    assert list(result.gradients) == list(gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(result.gradients[name], torch.tensor(gradient), atol=1e-4, rtol=0)
    assert model.train_step(x, y).step == 1
    for name, weight in updated.items():
        torch.testing.assert_close(model.state_dict()[name], torch.tensor(weight), atol=1e-4, rtol=0)


def test_line_through_one_point_gives_gradients_of_weight_bias_and_input(client):
    line, x, y = nn.Linear(1, 1), torch.tensor([[2.0]]), torch.tensor([[4.0]])
    model = client.create_model(line, loss=nn.MSELoss(), example=(x, y))
    result = model.compute_gradients(x, y, input_gradients=True)
    x.requires_grad_()
    nn.functional.mse_loss(line(x), y).backward()
    torch.testing.assert_close(result.gradients, {name: p.grad for name, p in line.named_parameters()})
    torch.testing.assert_close(result.input_gradients, x.grad)


@pytest.mark.parametrize("workers", [1, 2])
def test_mlp_on_one_random_row_gives_four_gradients(client, workers):
    net = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 1))
    x, y = torch.randn(1, 10), torch.randn(1, 1)
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), workers=workers)
    result = model.compute_gradients(x, y)
    nn.functional.mse_loss(net(x), y).backward()
    assert len(result.gradients) == 4
    torch.testing.assert_close(result.gradients, {name: p.grad for name, p in net.named_parameters()})


class SquareWithAnotherBackward(torch.autograd.Function):
    """Its backward is not its forward's derivative: differentiating the forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * 30 * x


def test_custom_autograd_function_has_its_own_backward(client):
    gradient = client.grad(lambda x: SquareWithAnotherBackward.apply(x).sum())(torch.tensor([2.0]))
    assert gradient.tolist() == [60.0]


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(-10.0))
        self.b = nn.Parameter(torch.tensor(-20.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w * x + self.b


@pytest.mark.parametrize("workers", [1, 2])
def test_line_through_noise_follows_local_torch_and_finds_slope_and_intercept(client, workers):
    x = torch.arange(-5, 5, 0.1).unsqueeze(1)
    y = -5 * x + 0.4 * torch.randn_like(x)
    line = Line()
    local = torch.optim.SGD(line.parameters(), lr=0.1)
    model = client.create_model(line, loss=nn.MSELoss(), optimizer=optim.SGD(lr=0.1), example=(x, y), workers=workers)
    for _ in range(40):
        held = model.forward_backward(x, y)
        gradients = model.compute_gradients(x, y).gradients
        model.optimizer_step()
        model.zero_grad()
        local.zero_grad()
        loss = nn.functional.mse_loss(line(x), y)
        loss.backward()
        assert held.loss == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in line.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
        local.step()
    assert model.state_dict()["w"].item() == pytest.approx(-5, abs=0.1)
    assert model.state_dict()["b"].item() == pytest.approx(0, abs=0.2)


def thermometer_loss(params: torch.Tensor, t_u: torch.Tensor, t_c: torch.Tensor) -> torch.Tensor:
    w, b = params
    return ((w * t_u + b - t_c) ** 2).mean()


def test_gradient_of_the_thermometer_whose_parameters_are_one_tensor(client):
    loss, gradient = client.value_and_grad(thermometer_loss)(torch.tensor([1.0, 0.0]), T_U, T_C)
    assert loss.item() == pytest.approx(1763.8848, abs=1e-4)
    torch.testing.assert_close(gradient, torch.tensor([4517.2969, 82.6]), atol=1e-3, rtol=0)
