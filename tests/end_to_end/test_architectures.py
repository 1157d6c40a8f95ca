"""Modules that the service builds by name compute what the same modules compute here, on one rank and on two."""

from __future__ import annotations

import random
import struct
from typing import Any

import grpc
import pytest
import torch
import torch.nn.functional as F
from end_to_end.architecture_cases import CASES, ROWS, assert_same_state, layer, local_loss
from safetensors.torch import save_file
from torch import nn

from gradwire import Architecture, optim
from gradwire.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import gradient_service_pb2_grpc as pb_grpc
from gradwire_proto.v1 import tensor_pb2


@pytest.mark.parametrize(("name", "workers"), [*((name, 2) for name in CASES), ("convolutions", 1), ("gpt2", 1)])
def test_loss_gradients_and_update_are_those_of_the_same_module_here(client, name, workers):
    case, seed = CASES[name], random.randrange(2**40)
    inputs, targets = case.inputs(ROWS), case.targets(ROWS)
    model = client.create_model(
        case.architecture,
        loss=case.loss,
        optimizer=optim.SGD(lr=0.1),
        example=(inputs, targets),
        workers=workers,
        seed=seed,
    )
    if workers == 2:
        assert model.info().sharding.mode == case.sharding
    torch.manual_seed(seed)
    module = case.local()
    assert_same_state(model, module, exact=True)
    assert model.info().num_parameters == sum(parameter.numel() for parameter in module.parameters())

    # Other rows than the example's; two ranks get uneven shares, and the second a dummy row.
    for rows in (ROWS, 3) if name == "convolutions" else (ROWS, 1):
        inputs, targets = case.inputs(rows), case.targets(rows)
        for training in (True, False):
            module.train(training)
            buffers = {key: buffer.clone() for key, buffer in module.named_buffers()}
            loss = local_loss(case, module, inputs, targets)
            gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
            for key, buffer in module.named_buffers():
                buffer.copy_(buffers[key])
            result = model.compute_gradients(inputs, targets, training=training)
            assert result.loss == pytest.approx(loss.item(), rel=1e-5)
            for (key, _), gradient in zip(module.named_parameters(), gradients, strict=True):
                found = result.gradients.get(key)
                assert (found is None) == (gradient is None), key
                if gradient is not None:
                    torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-5)
        assert_same_state(model, module, exact=True)

    inputs, targets = case.inputs(ROWS), case.targets(ROWS)
    module.train()
    step = torch.optim.SGD(module.parameters(), lr=0.1)
    loss = local_loss(case, module, inputs, targets)
    loss.backward()
    step.step()
    assert model.train_step(inputs, targets).loss == pytest.approx(loss.item(), rel=1e-5)
    assert_same_state(model, module, exact=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_outputs_are_nested_as_the_module_nests_them(client, workers):
    architecture = layer("LSTM", input_size=3, hidden_size=4, num_layers=2, batch_first=True)
    model = client.create_model(architecture, example=(torch.randn(4, 5, 3),), workers=workers, seed=3)
    torch.manual_seed(3)
    module, x = nn.LSTM(3, 4, num_layers=2, batch_first=True), torch.randn(3, 6, 3)
    expected, (hidden, cell) = module(x)
    found = model.forward(x)
    assert isinstance(found, tuple) and isinstance(found[1], tuple)
    for one, other in ((found[0], expected), (found[1][0], hidden), (found[1][1], cell)):
        torch.testing.assert_close(one, other)


def test_first_weights_come_from_the_folder_that_the_operator_allows(client, weights_folder):
    module = nn.Sequential(nn.Linear(3, 2))
    (weights_folder / "team").mkdir()
    save_file(module.state_dict(), weights_folder / "team" / "model.safetensors")
    linear, x = [layer("Linear", in_features=3, out_features=2)], torch.randn(4, 3)
    model = client.create_model(Architecture("torch.nn.Sequential", weights="team", layers=linear), example=(x,))
    assert_same_state(model, module, exact=True)
    for weights in ("../team", "/etc", str(weights_folder / "team")):
        with pytest.raises(InvalidArgument) as refused:
            client.create_model(Architecture("torch.nn.Sequential", weights=weights, layers=linear), example=(x,))
        assert refused.value.reason == "WEIGHTS_PATH_INVALID"


def test_a_client_without_torch_makes_and_trains_a_model(service):
    def text(value: str) -> tensor_pb2.Value:
        return tensor_pb2.Value(text=value)

    def mapping(**entries: tensor_pb2.Value) -> tensor_pb2.ValueMapping:
        return tensor_pb2.ValueMapping(entries=[tensor_pb2.ValueEntry(key=k, value=v) for k, v in entries.items()])

    def module(name: str, **config: int) -> tensor_pb2.Value:
        numbers = mapping(**{key: tensor_pb2.Value(integer=value) for key, value in config.items()})
        return tensor_pb2.Value(dict=mapping(name=text(name), config=tensor_pb2.Value(dict=numbers)))

    def tensor(rows: list[list[float]]) -> tensor_pb2.Value:
        flat = [number for row in rows for number in row]
        data = struct.pack(f"<{len(flat)}f", *flat)
        shape = [len(rows), len(rows[0])]
        return tensor_pb2.Value(tensor=tensor_pb2.Tensor(dtype=tensor_pb2.DTYPE_FLOAT32, shape=shape, data=data))

    layers = tensor_pb2.ValueSequence(
        items=[module("torch.nn.Linear", in_features=2, out_features=1), module("torch.nn.Identity")]
    )
    request = pb.CreateModelRequest(model_id="foreign")
    request.model.program.architecture.name = "torch.nn.Sequential"
    request.model.program.architecture.config.CopyFrom(mapping(layers=tensor_pb2.Value(list=layers)))
    request.model.loss.torch.name = "mse_loss"
    request.model.optimizer.name = "SGD"
    request.model.optimizer.options.CopyFrom(mapping(lr=tensor_pb2.Value(number=0.1)))
    with grpc.insecure_channel(service) as channel:
        stub: Any = pb_grpc.GradientServiceStub(channel)
        made = stub.CreateModel(request)
        try:
            assert (made.architecture, made.parameter_count) == ("torch.nn.Sequential", 3)
            assert [each.name for each in made.tensors] == ["0.weight", "0.bias"]
            batch = tensor_pb2.Batch(
                inputs=tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]]), targets=tensor([[1.0], [2.0], [3.0]])
            )
            losses = [
                stub.TrainStep(pb.TrainStepRequest(name=made.name, batch=batch, learning_rate=0.01)).result.loss
                for _ in range(20)
            ]
        finally:
            stub.DeleteModel(pb.DeleteModelRequest(name=made.name))
    torch.manual_seed(0)
    net = nn.Linear(2, 1)
    expected = F.mse_loss(net(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 7.0]])), torch.tensor([[1.0], [2.0], [3.0]]))
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)
    assert losses[-1] < losses[0]
