"""Functions that bring their own backward: the service runs that, and does not differentiate their forward."""

import torch
from service import open_service


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * 2 * x


class SquareWithAnotherBackward(Square):
    """Differentiating its forward would give another number than its author asks for."""

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        return grad_output * 30 * x


x = torch.tensor([2.0])

with open_service() as client:
    print("grad_x", client.grad(lambda x: Square.apply(x).sum())(x).tolist())
    another = client.grad(lambda x: SquareWithAnotherBackward.apply(x).sum())(x)
    print("grad_x of another backward", another.tolist())
