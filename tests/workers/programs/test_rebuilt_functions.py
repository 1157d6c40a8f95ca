"""A plain function exported, sent and rebuilt gives what torch.func gives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils import _pytree as pytree

from gradwire.function_arguments import tensor_leaves
from gradwire.functions import export_function
from gradwire_proto.codec import decode_function, decode_program, encode_function, encode_program
from gradwire_proto.errors import ExportError, InvalidArgument
from gradwire_proto.function_digest import function_digest
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1.gradient_service_pb2 import Function
from gradwire_workers.programs import build_program

OFFSET = torch.randn(3)


def remotely(fn, *args, argnums=0, has_aux=False, with_value=False):
    """What `client.grad` or `client.value_and_grad` answers, computed here as on a rank."""
    exported = export_function(fn, args, argnums=argnums, has_aux=has_aux)
    program = decode_program(encode_program(exported.spec.program))
    built = build_program(program, {name: tensor.clone() for name, tensor in exported.constants.items()})
    inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in tensor_leaves(args)]
    outputs = built("eval", *inputs)
    wanted = [t for t in inputs if t.requires_grad]
    found = iter(
        torch.autograd.grad(outputs[0], wanted, allow_unused=True) if outputs[0].requires_grad else [None] * 99
    )
    gradients = tuple(next(found) if t.requires_grad else None for t in inputs)
    flat = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in outputs)
    return exported.finish(gradients, flat, with_value)


def same(one, other) -> bool:
    ours, spec = pytree.tree_flatten(one)
    theirs, other_spec = pytree.tree_flatten(other)
    assert spec == other_spec
    return all(
        torch.allclose(a, b, rtol=1e-6) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def loss(params, x, power):
    return ((params["w"] * x + params["b"] + OFFSET) ** power).mean()


PARAMS = {"w": torch.randn(3), "b": torch.tensor(0.5)}
X = torch.randn(4, 3)


@pytest.mark.parametrize("argnums", [0, 1, -2, (0,), (0, 1), (1, 0)])
def test_gradients_nest_as_the_arguments_do(argnums):
    assert same(remotely(loss, PARAMS, X, 2, argnums=argnums), torch.func.grad(loss, argnums=argnums)(PARAMS, X, 2))


def test_value_and_grad_gives_value_first():
    value, gradients = remotely(loss, PARAMS, X, 3, with_value=True)
    expected, expected_value = torch.func.grad_and_value(loss)(PARAMS, X, 3)
    assert same(value, expected_value) and same(gradients, expected)


def test_aux_comes_along_in_its_own_nesting():
    def with_aux(x):
        return (x**2).sum(), {"twice": x * 2, "n": 3, "none": None}

    assert same(remotely(with_aux, X, has_aux=True), (2 * X, with_aux(X)[1]))
    (value, aux), gradients = remotely(with_aux, X, has_aux=True, with_value=True)
    assert same((value, aux, gradients), (*with_aux(X), 2 * X))


def test_numpy_arrays_and_float64_are_taken():
    gradient = remotely(lambda x: (x**3).sum(), np.arange(4.0))
    assert gradient.dtype == torch.float64 and torch.equal(gradient, 3 * torch.arange(4.0, dtype=torch.float64) ** 2)


def test_an_argument_that_does_not_count_has_gradient_zero():
    assert torch.equal(remotely(lambda x, y: x.sum(), X, OFFSET, argnums=1), torch.zeros(3))
    assert torch.equal(remotely(lambda x: OFFSET.sum(), X), torch.zeros(4, 3))


def test_the_digest_is_the_same_on_the_other_end_of_the_wire():
    exported = export_function(lambda x: ((x + OFFSET) ** 2).sum(), (X,))
    tensors = {name: from_torch(tensor) for name, tensor in exported.constants.items()}
    sent = Function.FromString(encode_function(replace(exported.spec, tensors=tensors)).SerializeToString())
    received = decode_function(sent)
    assert received.program is not None
    assert function_digest(received.program, received.tensors, received.output_leaf) == received.digest


def test_the_digest_follows_program_and_constants():
    def digest(offset, power=2):
        return export_function(lambda x: ((x + offset) ** power).sum(), (X,)).spec.digest

    assert digest(OFFSET) == digest(OFFSET.clone()) != digest(OFFSET + 1)
    assert digest(OFFSET) != digest(OFFSET, power=3)
    assert len(digest(OFFSET)) == 64


def test_random_functions_say_so():
    assert export_function(lambda x: (x * torch.rand(3)).sum(), (X,)).is_random
    assert not export_function(lambda x: x.sum(), (X,)).is_random


@pytest.mark.parametrize(
    ("fn", "args", "options", "reason"),
    [
        (lambda x: x * 2, (X,), {}, "VALUE_NOT_SCALAR"),
        (lambda x: 3.0, (X,), {}, "VALUE_NOT_SCALAR"),
        (lambda x: x.sum(), (X,), {"has_aux": True}, "AUX_MISSING"),
        (lambda x: x.sum(), (X,), {"argnums": 1}, "ARGNUMS_INVALID"),
        (lambda x: x.sum(), (X,), {"argnums": ()}, "ARGNUMS_INVALID"),
        (lambda x, n: (x * n).sum(), (X, 2.0), {"argnums": 1}, "ARGNUMS_INVALID"),
        (lambda x: x.sum(), (torch.arange(3),), {}, "ARGNUMS_INVALID"),
        (lambda x: (x @ x).sum(), (X,), {}, "EXAMPLE_FAILED"),
        (lambda x: x.sum() if x.sum() > 0 else -x.sum(), (X,), {}, "EXPORT_DATA_DEPENDENT"),
    ],
)
def test_wrong_functions_and_arguments_are_refused(fn, args, options, reason):
    with pytest.raises(InvalidArgument) as caught:
        export_function(fn, args, **options)
    assert caught.value.reason == reason
    assert isinstance(caught.value, ExportError) or reason == "ARGNUMS_INVALID"


def test_random_state_is_left_alone():
    before = torch.get_rng_state()
    export_function(lambda x: (x * torch.rand(3)).sum(), (X,))
    assert torch.equal(before, torch.get_rng_state())
