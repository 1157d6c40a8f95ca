"""Hessian times vector: that of plain torch on the whole batch, for every kind of loss and number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwire_proto.errors import InvalidArgument


class Net(nn.Module):
    """float[n, 6] -> float[n, 3]. `unused` has no part in the loss, `linear` in no second derivative but mixed ones."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.linear = nn.Linear(6, 8), middle, nn.Linear(8, 3)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.middle(self.first(x)))


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(-1, 1, 4, 2)
        return F.scaled_dot_product_attention(parts, parts.tanh(), parts).reshape(-1, 8)


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Slope.apply(x)  # type: ignore[return-value]


LOSSES = {
    "by name": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), ignore_index=2),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "graph": lambda outputs, targets: F.cross_entropy(outputs, targets).square(),
    "whole batch": lambda outputs, targets: (outputs @ outputs.T).logsumexp(1).sub(targets).pow(2).mean(),
}


def expected(module: nn.Module, loss: Any, x: Tensor, y: Tensor, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
    parameters = [dict(module.named_parameters())[name] for name in vectors]
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(
            loss(module(x), y), parameters, create_graph=True, allow_unused=True, materialize_grads=True
        )
        moving = [(each, vectors[name]) for each, name in zip(gradients, vectors, strict=True) if each.requires_grad]
        products = torch.autograd.grad(
            [each for each, _ in moving],
            parameters,
            [vector for _, vector in moving],
            allow_unused=True,
            materialize_grads=True,
        )
    return dict(zip(vectors, products, strict=True))


def batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 6).double(), torch.randint(3, (rows,))


def vectors_for(module: nn.Module, only: str = "") -> dict[str, Tensor]:
    return {name: torch.randn_like(each) for name, each in module.named_parameters() if name.startswith(only)}


def check(group: Any, module: nn.Module, loss: Any, rows: int, assert_close: Any, only: str = "") -> None:
    x, y = batch(rows)
    y[-1], y[0] = 2, 0  # one that is ignored, and never all
    vectors = vectors_for(module, only)
    report, *_ = group.compute_gradients(x, y, vectors=vectors)
    reference = copy.deepcopy(module)
    assert_close(report.gradients, expected(reference, loss, x, y, vectors), tolerance=1e-10)
    assert report.loss == pytest.approx(loss(copy.deepcopy(module)(x), y).item(), rel=1e-10)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("kind", LOSSES)
def test_products_equal_torchs_on_the_whole_batch(ranks, kind, make_group, assert_close) -> None:
    module = Net(nn.Tanh()).double()
    group = make_group(module, LOSSES[kind], batch(4), ranks=ranks)
    for rows in (7, 2):
        check(group, module, LOSSES[kind], rows, assert_close)
        split = kind in ("by name", "sum") and ranks > 1
        assert (max(group.rank_rows()) < rows) is split
    check(group, module, LOSSES[kind], 5, assert_close, only="linear")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "middle", [nn.BatchNorm1d(8), Attends(), nn.LayerNorm(8)], ids=lambda each: type(each).__name__
)
def test_layers_with_awkward_second_derivatives_are_exact(ranks, middle, make_group, assert_close) -> None:
    module = Net(middle).double()
    group = make_group(module, nn.CrossEntropyLoss(), batch(4), ranks=ranks)
    before = group.state_dict()
    check(group, module, nn.CrossEntropyLoss(), 7, assert_close)
    for name, tensor in group.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} has moved"


@pytest.mark.parametrize("ranks", [1, 2])
def test_second_derivative_of_a_custom_function_is_refused_and_the_ranks_go_on(ranks, make_group) -> None:
    module = Net(Custom()).double()
    group = make_group(module, nn.CrossEntropyLoss(), batch(4), ranks=ranks)
    x, y = batch(4)
    with pytest.raises(InvalidArgument, match="differentiated twice") as caught:
        group.compute_gradients(x, y, vectors=vectors_for(module))
    assert caught.value.reason == "GRADIENT_UNKNOWN"
    group.train_step(x, y)


@pytest.mark.parametrize(
    ("name", "vector", "reason"),
    [
        ("firs.weight", torch.randn(8, 6).double(), "NO_MATCH"),
        ("first.weight", torch.randn(6, 8).double(), "SHAPE_MISMATCH"),
        ("first.weight", torch.randn(8, 6), "DTYPE_MISMATCH"),
        ("middle.running_mean", torch.randn(8).double(), "NO_MATCH"),
    ],
)
def test_vector_that_fits_no_parameter_is_refused(name, vector, reason, make_group) -> None:
    group = make_group(Net(nn.BatchNorm1d(8)).double(), nn.CrossEntropyLoss(), batch(4), ranks=1)
    with pytest.raises(InvalidArgument) as caught:
        group.compute_gradients(*batch(4), vectors={name: vector})
    assert (caught.value.reason, caught.value.field) == (reason, f'vectors["{name}"]')
