"""Arguments of the wrong kind: refused by name before anything is sent, by blocking calls and by futures alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwire
from gradwire import errors, optim
from gradwire.client import Client
from gradwire_proto import codec
from gradwire_proto.tensors import to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import GradientResult, StepResult

X, Y = torch.randn(4, 3), torch.randint(0, 2, (4,))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2))


@pytest.fixture
def model(held_model) -> gradwire.Model:
    return held_model(net(), nn.CrossEntropyLoss(), (X, Y))


@pytest.fixture
def sdk(rpc) -> Client:
    return Client(rpc)


@contextmanager
def wrong(field: str) -> Iterator[pytest.ExceptionInfo[errors.InvalidArgument]]:
    """The block raises an InvalidArgument about `field`."""
    with pytest.raises(errors.InvalidArgument) as caught:
        yield caught
    assert caught.value.field == field, caught.value


class NoNames:
    """Not a name, and nothing to look into."""


WRONG_CALLS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "train_step": [
        ({"inputs": X, "targets": Y, "lr": "x"}, "lr"),
        ({"inputs": X, "targets": Y, "lr": 10**400}, "lr"),
        ({"inputs": NoNames(), "targets": Y}, "batch.inputs"),
    ],
    "optimizer_step": [
        ({"gradients": 5}, "gradients"),
        ({"gradients": [torch.zeros(2)]}, "gradients"),
        ({"gradients": {1: torch.zeros(2)}}, "gradients"),
        ({"gradients": {"\ud800": torch.zeros(2)}}, "gradients"),
        ({"gradients": {"0.bias": 1.5}}, 'gradients["0.bias"]'),
        ({"lr": [0.1]}, "lr"),
    ],
    "compute_gradients": [
        ({"inputs": X, "targets": Y, "wrt": 3}, "wrt"),
        ({"inputs": X, "targets": Y, "wrt": b"0.*"}, "wrt"),
        ({"inputs": X, "targets": Y, "wrt": net()[0].weight}, "wrt"),
        ({"inputs": X, "targets": Y, "wrt": [1]}, "wrt[0]"),
        ({"inputs": X, "targets": Y, "wrt": ("0.*", "\ud800")}, "wrt[1]"),
        ({"inputs": X, "targets": Y, "input_gradients": "yes"}, "input_gradients"),
        ({"inputs": X, "targets": Y, "outputs": 1}, "outputs"),
        ({"inputs": X, "targets": Y, "training": "no"}, "training"),
        ({"inputs": X, "targets": Y, "seed": 1.5}, "seed"),
        ({"inputs": X, "targets": Y, "seed": True}, "seed"),
        ({"inputs": X, "targets": Y, "seed": 2**63}, "seed"),
        ({"inputs": X, "targets": Y, "dtype": np.float32}, "gradient_dtype"),
        ({"inputs": X, "targets": Y, "dtype": []}, "gradient_dtype"),
        ({"inputs": X, "targets": Y, "dtype": torch.uint16}, "gradient_dtype"),
        ({"inputs": X, "targets": Y, "dtype": "float31"}, "gradient_dtype"),
    ],
    "fit": [
        ({"data": (X, Y), "epochs": 2**63}, "epochs"),
        ({"data": (X, Y), "epochs": 1, "batch_size": 10**5000}, "batch_size"),
        ({"data": (X, Y), "epochs": 1, "seed": 2**64 - 1}, "seed"),
        ({"data": (X, Y), "epochs": 1, "seed": -(2**63) - 1}, "seed"),
        ({"data": (X, Y), "epochs": 1, "callbacks": 3}, "callbacks"),
        ({"data": (X, Y), "epochs": 1, "callbacks": [3]}, "callbacks[0]"),
        ({"data": NoNames(), "epochs": 1}, "data.inputs"),
        ({"data": (X, Y, Y), "epochs": 1}, "data"),
    ],
    "forward": [({"inputs": X, "training": "yes"}, "training"), ({"inputs": X, "training": 1}, "training")],
    "load_state_dict": [
        ({"state_dict": 5}, "state_dict"),
        ({"state_dict": net()}, "state_dict"),
        ({"state_dict": {2: torch.zeros(2)}}, "state_dict"),
        ({"state_dict": {"0.bias": [0.0, 1.0]}}, 'tensors["0.bias"]'),
        ({"state_dict": {}, "partial": "yes"}, "partial"),
    ],
}
EACH = [(name, arguments, field) for name, cases in WRONG_CALLS.items() for arguments, field in cases]


@pytest.mark.parametrize(("call", "arguments", "field"), EACH)
def test_model_refuses_an_argument_of_the_wrong_kind_by_name_and_sends_nothing(model, scripted, call, arguments, field):
    with wrong(field):
        getattr(model, call)(**arguments)
    future = getattr(model.futures, call)(**arguments)
    with wrong(field):
        future.result(5)
    assert scripted.calls == []


def test_steps_are_taken_from_what_can_be_iterated_over(model):
    with wrong("batches"):
        model.train_steps(5)
    with wrong("in_flight"):
        model.train_steps([], in_flight=2**63)

    class Broken:
        def __iter__(self):
            raise TypeError("an error of the user's own")

    with pytest.raises(TypeError, match="of the user's own"):
        model.train_steps(Broken())


def test_future_raises_even_what_is_no_error_of_gradwire(model):
    class Broken(dict):
        def items(self):
            raise RuntimeError("a mapping of the user's own")

    future = model.futures.optimizer_step(Broken(a=torch.zeros(2)))
    with pytest.raises(RuntimeError, match="of the user's own"):
        future.result(5)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"module": 5}, "module"),
        ({"example": (X, Y, Y)}, "example"),
        ({"example": [X, Y, Y]}, "example"),
        ({"loss": 5}, "loss"),
        ({"optimizer": 0.1}, "optimizer"),
        ({"workers": "2"}, "model.workers"),
        ({"model_id": 5}, "model_id"),
        ({"seed": "x"}, "model.seed"),
        ({"device": ["cpu"]}, "model.device"),
        ({"gpus_per_worker": None}, "model.gpus_per_worker"),
        ({"require_sharding": "yes"}, "model.require_sharding"),
        ({"on_nan": ["report"]}, "model.on_nan"),
        ({"labels": ["a"]}, "model.labels"),
        ({"labels": {1: "a"}}, "model.labels"),
        ({"labels": {"a": 1}}, 'model.labels["a"]'),
        ({"labels": {"a": "\ud800"}}, 'model.labels["a"]'),
    ],
)
def test_creation_refuses_an_argument_of_the_wrong_kind_by_name_and_sends_nothing(sdk, scripted, arguments, field):
    with wrong(field):
        sdk.create_model(**{"module": net(), "loss": "cross_entropy", "example": (X, Y)} | arguments)
    assert scripted.calls == []


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda sdk: sdk.get_model(5), "model_id"),
        (lambda sdk: sdk.get_model(None), "model_id"),
        (lambda sdk: sdk.grad(5), "fn"),
        (lambda sdk: sdk.value_and_grad("f"), "fn"),
        (lambda sdk: sdk.grad(torch.sum, has_aux="no"), "has_aux"),
        (lambda sdk: sdk.grad(torch.sum, argnums="x")(X), "argnums"),
        (lambda sdk: sdk.on_close(5), "callback"),
    ],
)
def test_client_refuses_an_argument_of_the_wrong_kind_by_name_and_sends_nothing(
    sdk: Client, scripted, call: Callable[[Any], object], field: str
):
    with wrong(field):
        call(sdk)
    assert scripted.calls == []


def test_negative_number_of_gpus_is_out_of_range_and_no_matter_of_the_optimizer(sdk):
    with wrong("model.gpus_per_worker") as caught:
        sdk.create_model(net(), loss="cross_entropy", example=(X, Y), gpus_per_worker=-1)
    assert caught.value.reason == "NUMBER_OUT_OF_RANGE"


def test_message_about_a_tensor_does_not_print_it(model):
    with wrong("wrt") as caught:
        model.compute_gradients(X, Y, wrt=torch.zeros(1000))
    assert "a Tensor" in caught.value.message and len(str(caught.value)) < 100


def test_numbers_of_numpy_are_taken_where_python_s_are(model, scripted):
    scripted.answers["ComputeGradients"] = lambda request, context: codec.encode_gradient_result(
        GradientResult(loss=0.5, step=0, num_examples=4, gradients={}, input_gradients=None, outputs=None)
    )
    scripted.answers["TrainStep"] = lambda request, context: pb.TrainStepResponse(
        result=codec.encode_step_result(StepResult(loss=0.5, step=1, num_examples=4))
    )
    model.compute_gradients(X, Y, seed=np.int32(7), wrt=iter(["0.bias"]))
    (asked,) = map(codec.decode_gradient_query, scripted.requests("ComputeGradients"))
    assert asked.seed == 7 and asked.wrt == ("0.bias",)
    for lr in (np.float32(0.25), Fraction(1, 4)):
        model.train_step(X, Y, lr=lr)
    assert [request.learning_rate for request in scripted.requests("TrainStep")] == [0.25, 0.25]
    assert optim.SGD(lr=np.float32(0.5)).lr == 0.5


@pytest.mark.parametrize("with_targets", [True, False])
def test_batch_of_a_data_loader_is_an_example(sdk, scripted, with_targets):
    created = []

    def refuse(request, context):
        created.append(request)
        raise errors.ResourceExhausted("enough seen", reason="NO_ROOM")

    scripted.answers["CreateModel"] = refuse
    dataset = TensorDataset(X, Y) if with_targets else TensorDataset(X)
    example = next(iter(DataLoader(dataset, batch_size=4)))
    assert type(example) is list
    with pytest.raises(errors.ResourceExhausted):
        sdk.create_model(net(), loss="cross_entropy" if with_targets else None, example=example, workers=2)
    sent = codec.decode_batch(created[0].example)
    assert torch.equal(to_torch(sent.inputs), X)
    assert torch.equal(to_torch(sent.targets), Y) if with_targets else sent.targets is None


def test_gradients_that_are_not_finite_are_refused_by_name_where_the_model_refuses_them(held_model, scripted):
    scripted.answers["OptimizerStep"] = lambda request, context: pb.OptimizerStepResponse(
        result=codec.encode_step_result(StepResult(loss=None, step=1, num_examples=0))
    )
    gradients = {"0.bias": torch.zeros(2), "0.weight": np.full((2, 3), np.nan, dtype=np.float32)}
    refusing = held_model(net(), nn.CrossEntropyLoss(), (X, Y), on_nan="refuse")
    with wrong('gradients["0.weight"]') as caught:
        refusing.optimizer_step(gradients)
    assert caught.value.reason == "GRADIENT_NOT_FINITE" and scripted.calls == []
    refusing.optimizer_step({"0.bias": torch.zeros(2)})
    held_model(net(), nn.CrossEntropyLoss(), (X, Y), on_nan="report").optimizer_step(gradients)
    assert len(scripted.requests("OptimizerStep")) == 2


class Complex(nn.Module):
    """`phase` is complex, `scale` is real; the loss is real."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return (self.phase * x).abs() * self.scale


def test_real_type_for_complex_gradients_is_refused_before_it_is_sent(held_model, scripted):
    x, y = torch.randn(4, 3, dtype=torch.complex64), torch.randn(4, 3)
    model = held_model(Complex(), nn.MSELoss(), (x, y))
    scripted.answers["ComputeGradients"] = lambda request, context: codec.encode_gradient_result(
        GradientResult(loss=0.5, step=0, num_examples=4, gradients={}, input_gradients=None, outputs=None)
    )
    for arguments in ({}, {"wrt": "ph*"}, {"wrt": ("scale", "phase")}, {"wrt": (), "input_gradients": True}):
        with wrong("gradient_dtype") as caught:
            model.compute_gradients(x, y, dtype=torch.float32, **arguments)
        assert caught.value.reason == "DTYPE_NOT_COMPLEX"
    assert scripted.calls == []
    model.compute_gradients(x, y, dtype=torch.complex128, input_gradients=True)
    model.compute_gradients(x, y, dtype=torch.float64, wrt="scale")
    assert len(scripted.requests("ComputeGradients")) == 2
