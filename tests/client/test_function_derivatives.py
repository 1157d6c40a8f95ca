"""Derivatives of plain functions: what is sent when, above all where the service has forgotten the function."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradwire
from gradwire import errors
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch, to_nested, to_torch
from gradwire_proto.values import DerivativeResult
from gradwire_workers.programs import build_program


class ForgetfulHost:
    """Computes values and products of the one function that comes along, and remembers it while `remembers`."""

    def __init__(self, scripted) -> None:
        self.remembers = False
        self.programs_received = 0
        self._known = {}
        scripted.answers["DifferentiateFunction"] = self.differentiate

    def differentiate(self, request, context):
        function = codec.decode_function(request.function)
        query, vectors = codec.decode_derivative_query(request)
        if function.program is not None:
            self.programs_received += 1
            state = {name: to_nested(tensor, writable=True) for name, tensor in function.tensors.items()}
            self._known[function.digest] = build_program(function.program, state, "cpu")
        elif not self.remembers:
            raise errors.FailedPrecondition("unknown function", reason="FUNCTION_UNKNOWN")
        leaves = list(to_nested(codec.decode_batch(request.batch).inputs, writable=True))
        wanted = [leaves[index].requires_grad_() for index in query.wrt]
        outputs = self._known[function.digest]("eval", *leaves)
        found = torch.autograd.grad(outputs, wanted, [to_torch(each) for each in vectors]) if vectors else ()
        result = DerivativeResult(
            outputs=tuple(from_torch(each.detach()) for each in outputs), derivatives=tuple(map(from_torch, found))
        )
        return codec.encode_derivative_result(result)


@pytest.fixture
def host(scripted) -> ForgetfulHost:
    return ForgetfulHost(scripted)


@pytest.fixture
def sdk(scripted, host):
    with gradwire.connect(scripted.target, timeout=5) as sdk:
        yield sdk


def test_a_function_is_sent_once_and_again_where_the_service_has_forgotten_it(sdk, host):
    x, v = torch.randn(3), torch.randn(3)
    for remembers, received in ((False, 1), (True, 1), (False, 2)):
        host.remembers = remembers
        output, _ = sdk.vjp(torch.sin, x)
        assert torch.equal(output, x.sin()) and host.programs_received == received
    output, pull = sdk.vjp(torch.sin, x)
    assert torch.allclose(pull(v)[0], x.cos() * v)
    assert host.programs_received == 4


def test_what_a_pullback_was_made_of_and_is_forgotten_is_never_another_function(sdk, host):
    factor = 2.0
    x = torch.randn(3)

    def scaled(x):
        return x * factor

    sdk.vjp(scaled, x)
    host.remembers = True
    _, pull = sdk.vjp(scaled, x)
    assert pull(x)[0].tolist() == (2 * x).tolist()
    factor = 3.0
    assert pull(x)[0].tolist() == (2 * x).tolist()
    host.remembers = False
    with pytest.raises(errors.FailedPrecondition) as caught:
        pull(x)
    assert caught.value.reason == "FUNCTION_CHANGED"


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_a_pullback_is_at_the_primals_as_they_were(sdk, host, kind):
    x = kind([1.0, 2.0])
    _, pull = sdk.vjp(lambda parts: parts["x"] ** 2, {"x": x})
    host.remembers = True
    x[:] = 5.0
    (gradient,) = pull(torch.ones(2, dtype=torch.as_tensor(x).dtype))
    assert gradient["x"].tolist() == [2.0, 4.0]
