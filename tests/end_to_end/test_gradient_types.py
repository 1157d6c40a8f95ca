"""Gradients that travel in a type of fewer bytes: rounded as torch rounds, and declared in the reply."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
import torch
from torch import nn

import gradwire
from gradwire import errors
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc
from gradwire_proto.v1 import tensor_pb2
from gradwire_proto.values import Batch

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    # So large that float16 has no finite number for some gradients.
    return torch.randn(8, 900) * 3e3, torch.randn(8, 2600) * 3e3


@pytest.fixture
def model(client, batch) -> gradwire.Model:
    return client.create_model(nn.Linear(900, 2600), loss=nn.MSELoss(reduction="sum"), example=batch, workers=2)


@pytest.fixture(params=["shared memory", "TCP"])
def reached(request, service, model) -> Iterator[gradwire.Model]:
    """The model, by a client of its own."""
    with gradwire.connect(service, shared_memory=request.param == "shared memory") as client:
        yield client.get_model(model.id)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gradients_are_those_of_their_own_type_as_torch_rounds_them(reached, batch, dtype):
    whole = reached.compute_gradients(*batch, input_gradients=True)
    half = reached.compute_gradients(*batch, input_gradients=True, dtype=dtype)
    assert half.loss == whole.loss
    assert half.gradients.keys() == whole.gradients.keys() == {"weight", "bias"}
    for found, expected in (
        *((half.gradients[name], each) for name, each in whole.gradients.items()),
        (half.input_gradients, whole.input_gradients),
    ):
        assert found.dtype == dtype and expected.dtype == torch.float32
        assert torch.equal(found, expected.to(dtype))
    assert half.gradients["weight"].isfinite().all() == (dtype is torch.bfloat16)


@pytest.mark.parametrize("dtype", [*HALVES, "bfloat16"], ids=str)
def test_each_examples_gradients_are_rounded_alike(client, dtype):
    torch.manual_seed(0)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    model = client.create_model(nn.Linear(4, 3), loss="mse_loss", example=(x, y), workers=2)
    whole, half = (model.per_example_gradients(x, y, dtype=each) for each in (None, dtype))
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert all(torch.equal(half[name], each.to(kind)) for name, each in whole.items())
    assert {each.dtype for each in half.values()} == {kind}


def test_the_reply_declares_the_type_for_clients_in_any_language(service, model, batch):
    expected = model.compute_gradients(*batch).gradients["bias"].to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    request = pb.ComputeGradientsRequest(
        name=f"models/{model.id}", wrt=["bias"], gradient_dtype=tensor_pb2.DTYPE_BFLOAT16, input_gradients=True
    )
    codec.encode_batch(Batch(*map(from_torch, batch)), request.batch)
    with grpc.insecure_channel(service) as channel:
        reply = pb_grpc.GradientServiceStub(channel).ComputeGradients(request)
    (bias,) = reply.gradients
    assert bias.tensor.dtype == reply.input_gradients.tensor.dtype == tensor_pb2.DTYPE_BFLOAT16
    assert bias.tensor.data == expected and len(expected) == 2 * 2600
    assert len(reply.input_gradients.tensor.data) == 2 * 8 * 900


def test_a_type_that_holds_no_gradient_is_refused_by_field(model, batch):
    with pytest.raises(errors.InvalidArgument, match="floating-point or complex") as caught:
        model.compute_gradients(*batch, dtype=torch.int32)
    assert caught.value.field == "gradient_dtype"
