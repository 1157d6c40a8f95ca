"""Products, Jacobians, Hessians and each example's gradients through a real service: the numbers of torch.func."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gradwire.errors import ExportError, FailedPrecondition, InvalidArgument, ResourceExhausted

OFFSET = torch.randn(2, dtype=torch.float64)


def assert_same(found: Any, expected: Any) -> None:
    ours, spec = pytree.tree_flatten(found)
    theirs, wanted = pytree.tree_flatten(expected)
    assert spec == wanted
    for one, other in zip(ours, theirs, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def function(x: Tensor, parameters: dict[str, Tensor]) -> dict[str, Any]:
    hidden = (x @ parameters["w"] + parameters["b"] + OFFSET).tanh()
    return {"hidden": hidden, "rest": (hidden.sum(0) ** 2, x.pow(3).mean())}


def scalar(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    return function(x, parameters)["rest"][0].sum() * x.exp().sum()


@pytest.fixture
def arguments() -> tuple[Tensor, dict[str, Tensor]]:
    rows = int(torch.randint(2, 5, ()))
    return random(rows, 3), {"w": random(3, 2), "b": random(2)}


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0)])
def test_jacobians_and_hessians_are_nested_as_torch_func_nests_them(client, arguments, argnums) -> None:
    expected = torch.func.jacrev(function, argnums)(*arguments)
    assert_same(client.jacrev(function, argnums)(*arguments), expected)
    assert_same(client.jacrev(function, argnums, chunk_size=2)(*arguments), expected)
    # In torch 2.13, forward mode takes a negative number for none of the arguments, and gives zeros.
    places = argnums % 2 if isinstance(argnums, int) else argnums
    assert_same(client.hessian(function, argnums)(*arguments), torch.func.hessian(function, places)(*arguments))
    assert_same(client.hessian(scalar, argnums)(*arguments), torch.func.hessian(scalar, places)(*arguments))


def test_derivatives_of_one_number_and_of_mixed_types_look_as_torch_funcs(client) -> None:
    number = random(1)[0]
    assert_same(client.jacrev(torch.exp)(number), number.exp())
    assert_same(client.hessian(lambda x: x**3)(number), 6 * number)
    mixed = random(3).float(), random(3)
    expected = torch.func.hessian(lambda a, b: (a * b).sum(), (0, 1))(*mixed)
    assert_same(client.hessian(lambda a, b: (a * b).sum(), (0, 1))(*mixed), expected)


def test_products_with_vectors_are_torch_funcs(client, arguments) -> None:
    vectors = pytree.tree_map(torch.randn_like, arguments)
    assert_same(client.jvp(function, arguments, vectors), torch.func.jvp(function, arguments, vectors))
    value, products = client.hvp(scalar, arguments, vectors)
    assert_same(value, scalar(*arguments))
    assert_same(products, torch.func.jvp(torch.func.grad(scalar, (0, 1)), arguments, vectors)[1])
    x, v = arguments[0], vectors[0]
    assert_same(client.hvp(lambda x: x.sin().sum(), x, v), (x.sin().sum(), -x.sin() * v))


@pytest.mark.parametrize("count", [1, 2])
def test_vjp_gives_the_output_at_once_and_gradients_when_they_are_asked_for(client, arguments, count) -> None:
    given = [pytree.tree_map(torch.clone, each) for each in arguments]
    taken, fixed = given[:count], given[count:]

    def partly(*chosen: Any) -> Any:
        return function(*chosen, *fixed)

    output, pull = client.vjp(partly, *taken)
    expected, reference = torch.func.vjp(partly, *[pytree.tree_map(torch.clone, each) for each in taken])
    assert_same(output, expected)
    cotangents = pytree.tree_map(torch.randn_like, output)
    taken[0].zero_()  # The caller's own from here on.
    for _ in range(2):
        assert_same(pull(cotangents), reference(cotangents))


def test_auxiliary_outputs_of_any_kind_come_back_beside_derivatives(client) -> None:
    def pair(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return x**2, {"count": 3, "best": x.argmax(), "none": None}

    x, v = random(4), random(4)
    rows, aux = client.jacrev(pair, has_aux=True)(x)
    assert_same(rows, torch.diag(2 * x))
    *_, from_jvp = client.jvp(pair, (x,), (v,), has_aux=True)
    *_, from_vjp = client.vjp(pair, x, has_aux=True)
    for found in (aux, from_jvp, from_vjp):
        assert (found["count"], found["best"].item(), found["none"]) == (3, x.argmax().item(), None)


def test_arrays_are_taken_as_tensors(client) -> None:
    x = np.array([1.0, 2.0])
    assert client.jacrev(lambda x: x**2)(x).tolist() == [[2.0, 0.0], [0.0, 4.0]]
    assert client.jvp(lambda x: x**2, (x,), (x,))[1].tolist() == [2.0, 8.0]


def test_random_numbers_repeat_with_torchs_seed_and_within_one_vjp(client) -> None:
    x = random(200)

    def dropped(x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5)

    rows = []
    for _ in range(2):
        torch.manual_seed(3)
        rows.append(client.jacrev(dropped)(x))
    assert torch.equal(*rows) and not torch.equal(rows[0], client.jacrev(dropped)(x))
    output, pull = client.vjp(dropped, x)
    assert torch.equal(pull(torch.ones_like(x))[0] * x, output)


def test_what_a_function_reads_is_what_it_is_at_each_call(client) -> None:
    factor = 2.0
    x = random(2)
    jacobian = client.jacrev(lambda x: x * factor)
    assert_same(jacobian(x), torch.eye(2).double() * 2)
    factor = 3.0
    assert_same(jacobian(x), torch.eye(2).double() * 3)


class Cubed(torch.autograd.Function):
    """Its backward is not its forward's derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 100 * ctx.saved_tensors[0]


def test_a_custom_functions_own_backward_counts_and_nothing_is_made_up_beyond_it(client) -> None:
    x = random(3)
    assert_same(client.jacrev(Cubed.apply)(x), torch.diag(100 * x))
    for refused in (
        lambda: client.hessian(lambda x: Cubed.apply(x).sum())(x),
        lambda: client.jvp(Cubed.apply, (x,), (x,)),
        lambda: client.hvp(lambda x: Cubed.apply(x).sum(), x, x),
    ):
        with pytest.raises(InvalidArgument) as caught:
            refused()
        assert caught.value.reason == "GRADIENT_UNKNOWN"


def test_wrong_arguments_are_refused_by_name(client) -> None:
    x = random(3)
    for call, reason, field in (
        (lambda: client.jvp(torch.sin, x, x), "ARGUMENT_TYPE_INVALID", "primals"),
        (lambda: client.jvp(torch.sin, (x,), (x, x)), "STRUCTURE_MISMATCH", "tangents"),
        (lambda: client.jvp(torch.sin, (x,), (random(4),)), "SHAPE_MISMATCH", "tangents, leaf 0"),
        (lambda: client.jvp(torch.sin, (x,), (x.float(),)), "DTYPE_MISMATCH", "tangents, leaf 0"),
        (lambda: client.hvp(lambda x: x.sum(), x, [x]), "STRUCTURE_MISMATCH", "vectors"),
        (lambda: client.vjp(torch.sin, x)[1](random(4)), "SHAPE_MISMATCH", "cotangents, leaf 0"),
        (lambda: client.jacrev(torch.sin, 1)(x), "ARGNUMS_INVALID", "argnums"),
        (lambda: client.jacrev(torch.sin, chunk_size=0), "NUMBER_OUT_OF_RANGE", "chunk_size"),
        (lambda: client.hessian(torch.argmax)(x), "VALUE_NOT_DIFFERENTIABLE", None),
        (lambda: client.hvp(torch.sin, x, x), "VALUE_NOT_SCALAR", None),
        (lambda: client.jvp(lambda x: torch.ones(2), (x,), (x,), strict=True), "OUTPUT_INDEPENDENT", "strict"),
        (lambda: client.jvp(torch.sin, (), ()), "ARGUMENT_MISSING", "primals"),
        (lambda: client.vjp(lambda: x), "ARGUMENT_MISSING", "primals"),
        (lambda: client.vjp(torch.mul, x, torch.arange(3)), "PRIMAL_NOT_DIFFERENTIABLE", "primals[1]"),
        (lambda: client.jvp(torch.mul, (x, 2), (x, 2)), "PRIMAL_NOT_DIFFERENTIABLE", "primals[1]"),
        (lambda: client.hvp(torch.sum, torch.arange(3), x), "PRIMAL_NOT_DIFFERENTIABLE", "primals"),
    ):
        with pytest.raises((InvalidArgument, ExportError)) as caught:
            call()
        assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_jacobian_that_nobody_could_hold_is_refused_with_the_limits_name(client) -> None:
    with pytest.raises(ResourceExhausted, match="tensor_bytes") as caught:
        client.jacrev(torch.sin)(torch.randn(100_000))
    assert caught.value.reason == "DERIVATIVE_TOO_LARGE"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).tanh())


@pytest.mark.parametrize("workers", [1, 2])
def test_a_models_examples_and_curvature_are_plain_torchs(client, workers) -> None:
    net, loss = Net().double(), nn.CrossEntropyLoss()
    x, y = random(7, 4), torch.randint(3, (7,))
    model = client.create_model(net, loss=loss, example=(x, y), workers=workers)
    assert model.info().sharding.mode == "rows"
    parameters = dict(net.named_parameters())
    names = list(parameters)

    rows = [torch.autograd.grad(loss(net(x[i : i + 1]), y[i : i + 1]), [*parameters.values()]) for i in range(7)]
    each = {name: torch.stack([row[index] for row in rows]) for index, name in enumerate(names)}
    assert_same(model.per_example_gradients(x, y), each)
    assert_same(model.futures.per_example_gradients(x, y, wrt="last.*").result(), {n: each[n] for n in names[-2:]})

    vectors = {name: torch.randn_like(each) for name, each in parameters.items()}
    gradients = torch.autograd.grad(loss(net(x), y), [*parameters.values()], create_graph=True)
    products = torch.autograd.grad(gradients, [*parameters.values()], list(vectors.values()))
    assert_same(model.hvp(x, y, vectors), dict(zip(names, products, strict=True)))
    assert_same(model.futures.hvp(x, y, vectors).result(), dict(zip(names, products, strict=True)))


@pytest.mark.parametrize("workers", [1, 2])
def test_examples_of_a_model_that_mixes_rows_are_each_alone(client, workers) -> None:
    class Mixes(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            return h + h.mean(0)

    net, x, y = Mixes().double(), random(5, 4), random(5, 3)
    model = client.create_model(net, loss=nn.MSELoss(), example=(x, y), workers=workers)
    assert workers == 1 or model.info().sharding.mode == "whole"
    found = model.per_example_gradients(x, y)["first.weight"]
    for row in range(5):
        value = nn.functional.mse_loss(net(x[row : row + 1]), y[row : row + 1])
        assert_same(found[row], torch.autograd.grad(value, net.first.weight)[0])


def test_gradients_of_examples_that_are_many_travel_apart(client) -> None:
    net, x, y = nn.Linear(200, 100).double(), random(60, 200), random(60, 100)
    model = client.create_model(net, loss=nn.MSELoss(reduction="sum"), example=(x, y), workers=2)
    found = model.per_example_gradients(x, y)
    residual = 2 * (net(x) - y).detach()
    assert_same(found, {"weight": residual[:, :, None] * x[:, None, :], "bias": residual})
    vectors = {"weight": random(100, 200)}
    product = model.hvp(x, y, vectors)["weight"]
    assert_same(product, 2 * vectors["weight"] @ x.T @ x)


def test_a_module_that_cannot_be_exported_for_one_example_says_so(client) -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(4, 2))

    x, y = torch.randn(4, 2), torch.randn(4, 1)
    model = client.create_model(Pairs(), loss=nn.MSELoss(), example=(x, y))
    with pytest.raises(FailedPrecondition, match="no graph for one") as caught:
        model.per_example_gradients(x, y)
    assert (caught.value.reason, caught.value.field) == ("ROWS_NOT_OPEN", "per_example")


def test_vectors_that_are_missing_or_of_no_parameter_are_refused(client) -> None:
    net, x, y = Net(), torch.randn(4, 4), torch.randint(3, (4,))
    model = client.create_model(copy.deepcopy(net), loss=nn.CrossEntropyLoss(), example=(x, y), workers=2)
    for vectors, reason, field in (
        ({}, "VECTORS_MISMATCH", "vectors"),
        ({"first": torch.ones(6)}, "NO_MATCH", 'vectors["first"]'),
        ({"first.bias": torch.ones(5)}, "SHAPE_MISMATCH", 'vectors["first.bias"]'),
    ):
        with pytest.raises(InvalidArgument) as caught:
            model.hvp(x, y, vectors)
        assert (caught.value.reason, caught.value.field) == (reason, field)
    assert set(model.hvp(x, y, {"first.bias": torch.ones(6)})) == {"first.bias"}
