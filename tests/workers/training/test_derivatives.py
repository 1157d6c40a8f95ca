"""Derivatives of functions on a rank: torch.func's numbers, a custom function's own, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gradwire.functions import ExportedFunction, export_function
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.values import DerivativeQuery, Limits, ModelSpec, OutputLossSpec
from gradwire_workers.shard import Shard
from gradwire_workers.trainer import Trainer
from gradwire_workers.training import batched, forward_mode


class Slope(torch.autograd.Function):
    """Its backward is seven times too large: differentiating the forward would show."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 14 * ctx.saved_tensors[0]


def ask(
    exported: ExportedFunction, inputs: tuple[Tensor, ...], kind: str, vectors: Any, limit: int = 1 << 30, **query: Any
) -> list[Tensor]:
    """What a rank gives for the function, which another client may have exported."""
    assert exported.spec.program is not None
    trainer = Trainer(
        spec=ModelSpec(program=exported.spec.program, loss=OutputLossSpec(0)),
        state={name: tensor.clone() for name, tensor in exported.constants.items()},
        limits=Limits(tensor_bytes=limit),
    )
    shard = Shard(variant="eval", rows=1, start=0, stop=1, whole=True, inputs=inputs, targets=())
    return trainer.differentiate(shard, DerivativeQuery(kind=kind, **query), vectors).derivatives


def derive(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], kind: str, vectors: Any = (), **query: Any
) -> list[Tensor]:
    """The same with respect to all inputs."""
    places = tuple(range(len(inputs)))
    exported = export_function(function, inputs, argnums=places, scalar=False)
    return ask(exported, inputs, kind, vectors, wrt=places, **query)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each group of vectors that was tried together had to be computed one by one."""
    seen: list[bool] = []
    together = batched._together

    def watched(many: Any, group: Any) -> Any:
        found = together(many, group)
        seen.append(found is None)
        return found

    monkeypatch.setattr(batched, "_together", watched)
    return seen


def test_vectors_are_computed_together_where_operators_allow_it(alone: list[bool]) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    (found,) = derive(lambda x: (x**3).cumsum(0), (x,), "jacobian")
    assert torch.allclose(found, torch.func.jacrev(lambda x: (x**3).cumsum(0))(x), atol=1e-12)
    (found,) = derive(lambda x: (x**3).cumsum(0).sin().sum(), (x,), "hessian")
    assert torch.allclose(found, torch.func.hessian(lambda x: (x**3).cumsum(0).sin().sum())(x), atol=1e-10)
    assert alone == [False, False]


def test_vectors_are_computed_one_by_one_where_an_operator_is_random(alone: list[bool]) -> None:
    x = torch.randn(40, dtype=torch.float64)
    (found,) = derive(lambda x: torch.nn.functional.dropout(x**3, 0.5).sum(), (x,), "hessian", seed=11)
    torch.manual_seed(11)
    kept = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    assert alone == [True]
    assert torch.allclose(found, torch.diag(6 * x * kept), atol=1e-12)


def test_vectors_are_computed_one_by_one_where_a_backward_looks_at_values(alone: list[bool]) -> None:
    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            whole = torch.div((gradient * 8).to(torch.int64), 3, rounding_mode="trunc")
            return whole.to(gradient.dtype) * ctx.saved_tensors[0]

    x = torch.randn(4, dtype=torch.float64)
    (found,) = derive(Counted.apply, (x,), "jacobian")
    assert alone == [True]
    assert torch.equal(found, torch.diag(2 * x))


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_rows_of_a_jacobian_are_the_same_whatever_their_number_at_once(chunk_size: int, alone: list[bool]) -> None:
    x, w = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    found = derive(lambda x, w: (x @ w).tanh(), (x, w), "jacobian", chunk_size=chunk_size)
    expected = torch.func.jacrev(lambda x, w: (x @ w).tanh(), argnums=(0, 1))(x, w)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert len(alone) == {1: 0, 2: 3, 5: 1, 100: 1}[chunk_size]


def test_complex_numbers_are_differentiated_as_torch_func_does() -> None:
    def function(z: Tensor) -> Tensor:
        return z**2 * z.conj()

    z, v = torch.randn(3, dtype=torch.complex128), torch.randn(3, dtype=torch.complex128)
    (change,) = derive(function, (z,), "jvp", (v,))
    assert torch.allclose(change, torch.func.jvp(function, (z,), (v,))[1], atol=1e-12)
    (product,) = derive(function, (z,), "vjp", (v,))
    assert torch.allclose(product, torch.func.vjp(function, z)[1](v)[0], atol=1e-12)
    for kind in ("jacobian", "hessian"):
        with pytest.raises(InvalidArgument) as caught:
            derive(function, (z,), kind)
        assert (caught.value.reason, caught.value.field) == ("DTYPE_COMPLEX", "wrt")
        with pytest.raises(InvalidArgument) as caught:
            derive(lambda x: x * 1j, (z.real.clone(),), kind)
        assert (caught.value.reason, caught.value.field) == ("DTYPE_COMPLEX", "differentiated_outputs")


def test_regions_without_gradients_count_as_in_torch_func() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            fixed = x**2
        return (x * fixed).sum()

    x = torch.randn(4, dtype=torch.float64)
    for kind, expected in (("jacobian", torch.func.jacrev), ("hessian", torch.func.hessian)):
        (found,) = derive(function, (x,), kind)
        assert torch.allclose(found, expected(function)(x), atol=1e-12)


def test_outputs_changed_in_place_on_the_way_are_differentiated() -> None:
    def function(x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        total.add_(x**2)
        total[0] = x[1] * x[2]
        return total.mul_(2).sum()

    x = torch.randn(4, dtype=torch.float64)
    (found,) = derive(function, (x,), "hessian")
    assert torch.allclose(found, torch.autograd.functional.hessian(function, x), atol=1e-12)


def test_inputs_and_outputs_without_a_path_between_them_give_zeros() -> None:
    x, w = torch.randn(2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    found = derive(lambda x, w: (x.sin(), torch.ones(2, dtype=torch.float64)), (x, w), "jacobian", outputs=2)
    assert [tuple(each.shape) for each in found] == [(2, 2), (2, 3), (2, 2), (2, 3)]
    assert torch.allclose(found[0], torch.diag(x.cos()))
    assert not any(each.any() for each in found[1:])


def test_a_custom_functions_own_backward_counts() -> None:
    x, v = torch.randn(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    (product,) = derive(Slope.apply, (x,), "vjp", (v,))
    (rows,) = derive(Slope.apply, (x,), "jacobian")
    assert torch.allclose(product, 14 * x * v) and torch.allclose(rows, torch.diag(14 * x))


@pytest.mark.parametrize("kind", ["jvp", "hessian", "hvp"])
def test_a_derivative_that_a_custom_function_does_not_know_is_refused(kind: str) -> None:
    x = torch.randn(3)
    with pytest.raises(InvalidArgument, match="own backward alone") as caught:
        derive(lambda x: Slope.apply(x).sum(), (x,), kind, () if kind == "hessian" else (x,))
    assert (caught.value.reason, caught.value.field) == ("GRADIENT_UNKNOWN", "derivative")


@pytest.mark.parametrize("together", [True, False])
def test_hessians_of_many_numbers_are_computed_together_where_operators_allow_it(
    together: bool, alone: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x**3).cumsum(0).sin() * y.float().sum()

    if not together:
        monkeypatch.setattr(forward_mode, "_gradients_of", None)  # Whoever tried would fail.
    x, y = torch.randn(4, 2, dtype=torch.float32), torch.randn(3, dtype=torch.float64)
    found = derive(function, (x, y), "hessian")
    expected = torch.func.hessian(function, (0, 1))(x, y)
    for one, other in zip(found, (each for row in expected for each in row), strict=True):
        assert one.shape == other.shape and torch.allclose(one, other.to(one.dtype), atol=1e-5)
    assert alone == [False] * (2 if together else 2 * 8)


@pytest.mark.parametrize("kind", ["jvp", "hessian", "hvp"])
def test_a_derivative_that_a_condition_does_not_know_is_refused(kind: str) -> None:
    def chosen(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x**2, (x,)).sum()

    x = torch.randn(3, dtype=torch.float64)
    assert torch.allclose(derive(chosen, (x,), "jacobian")[0], x.cos() if x.sum() > 0 else 2 * x)
    with pytest.raises(InvalidArgument, match=r"torch\.cond") as caught:
        derive(chosen, (x,), kind, () if kind == "hessian" else (x,))
    assert (caught.value.reason, caught.value.field) == ("GRADIENT_UNKNOWN", "derivative")


def test_attention_has_second_derivatives_and_forward_ones() -> None:
    def attended(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q * 2, q.sin()).pow(2).sum()

    q, v = (torch.randn(1, 2, 3, 4, dtype=torch.float64) for _ in range(2))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.func.hessian(attended)(q)
    product = (hessian.reshape(24, 24) @ v.reshape(24)).view_as(v)
    assert torch.allclose(derive(attended, (q,), "hessian")[0], hessian, atol=1e-10)
    assert torch.allclose(derive(attended, (q,), "hvp", (v,))[0], product, atol=1e-10)
    expected = torch.func.grad(attended)(q).mul(v).sum()
    assert torch.allclose(derive(attended, (q,), "jvp", (v,))[0], expected, atol=1e-10)


@pytest.mark.parametrize(("kind", "numbers"), [("jacobian", 1000 * 1000), ("hessian", 1000 * 1000 * 1000)])
def test_a_derivative_above_the_limit_is_refused_before_it_is_computed(
    kind: str, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batched, "islice", None)  # Whoever began would fail.
    x = torch.randn(1000)
    with pytest.raises(ResourceExhausted, match=f"{numbers * 4} bytes; the limit `tensor_bytes` is 1000000") as caught:
        derive(lambda x: x.sin(), (x,), kind, limit=1_000_000)
    assert (caught.value.reason, caught.value.field) == ("DERIVATIVE_TOO_LARGE", "derivative")


@pytest.mark.parametrize(
    ("kind", "query", "vectors", "reason", "field"),
    [
        ("jacobian", {"wrt": (2,)}, (), "WRT_INVALID", "wrt[0]"),
        ("jacobian", {"wrt": (0, 1)}, (), "WRT_INVALID", "wrt[1]"),
        ("jacobian", {"wrt": (0,), "outputs": 3}, (), "INTEGER_OUT_OF_RANGE", "differentiated_outputs"),
        ("jacobian", {"wrt": (0,), "outputs": 2}, (), "OUTPUT_NOT_DIFFERENTIABLE", "differentiated_outputs"),
        ("hvp", {"wrt": (0,)}, (torch.randn(3),), "VALUE_NOT_SCALAR", "differentiated_outputs"),
        ("vjp", {"wrt": (0,)}, (torch.randn(4),), "SHAPE_MISMATCH", "vectors[0]"),
        ("jvp", {"wrt": (0,)}, (torch.randn(3).double(),), "DTYPE_MISMATCH", "vectors[0]"),
    ],
)
def test_what_other_clients_may_ask_and_does_not_fit_is_refused(
    kind: str, query: dict, vectors: Any, reason: str, field: str
) -> None:
    inputs = (torch.randn(3), torch.arange(3))
    exported = export_function(lambda x, n: (x * n, n), inputs, argnums=(0,), has_aux=True, scalar=False)
    with pytest.raises(InvalidArgument) as caught:
        ask(exported, inputs, kind, vectors, **query)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_strict_product_refuses_an_output_that_depends_on_nothing() -> None:
    x = torch.randn(3)
    with pytest.raises(InvalidArgument) as caught:
        derive(lambda x: torch.ones(2), (x,), "jvp", (x,), strict=True)
    assert (caught.value.reason, caught.value.field) == ("OUTPUT_INDEPENDENT", "strict")
    (change,) = derive(lambda x: torch.ones(2), (x,), "jvp", (x,))
    assert change.tolist() == [0.0, 0.0]
