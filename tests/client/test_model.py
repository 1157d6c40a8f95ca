"""Models as users see them: what their calls send, and what they make of the answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from client.one_model import FEATURES, RESULT, batch, empty, sent
from torch import nn

from gradwire import errors, optim
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import ForwardResult, GradientResult


def test_train_step_sends_the_batch_once_and_returns_the_result(model, scripted):
    x, y = batch()
    assert model.train_step(x, y, lr=0.25) == RESULT
    request = sent(scripted, "TrainStep")
    received = codec.decode_batch(request.batch)
    assert torch.equal(to_torch(received.inputs), x) and torch.equal(to_torch(received.targets), y)
    assert request.name == "models/mine" and request.learning_rate == 0.25 and len(request.request_id) == 36
    model.train_step(x, y)
    second = sent(scripted, "TrainStep")
    assert not second.HasField("learning_rate") and second.request_id != request.request_id


def test_numpy_arrays_are_taken_wherever_tensors_are(model, scripted):
    x, y = batch()
    # Neither contiguous nor writable.
    array = np.asfortranarray(x.numpy().copy())
    array.flags.writeable = False
    model.forward_backward(array, y.numpy())
    assert torch.equal(to_torch(codec.decode_batch(sent(scripted, "ForwardBackward").batch).inputs), x)
    model.optimizer_step({"0.bias": np.ones(2, dtype=np.float32), "0.weight": None})
    gradients = codec.decode_named_tensors(sent(scripted, "OptimizerStep").gradients)
    assert list(gradients) == ["0.bias"] and torch.equal(to_torch(gradients["0.bias"]), torch.ones(2))
    model.load_state_dict({"0.bias": np.zeros(2)}, partial=True)
    assert sent(scripted, "LoadStateDict").partial


def test_client_gradients_that_are_all_none_are_refused(model):
    with pytest.raises(errors.InvalidArgument, match="at least one gradient"):
        model.optimizer_step({"0.bias": None})


@pytest.mark.parametrize("lr", [-0.1, float("nan"), "fast"])
def test_learning_rate_out_of_range_is_refused_before_it_is_sent(model, scripted, lr):
    with pytest.raises(errors.InvalidArgument) as caught:
        model.train_step(*batch(), lr=lr)
    assert caught.value.field == "lr" and scripted.requests("TrainStep") == []


def test_compute_gradients_asks_for_what_was_asked_and_returns_torch_tensors(model, scripted):
    gradient, outputs = torch.randn(2, FEATURES, dtype=torch.float64), torch.randn(6, 2)
    result = GradientResult(
        loss=0.5,
        step=3,
        num_examples=6,
        gradients={"0.weight": from_torch(gradient)},
        input_gradients=from_torch(torch.ones(6, FEATURES)),
        outputs=from_torch(outputs),
        rank_rows=(6,),
    )
    scripted.answers["ComputeGradients"] = lambda request, context: codec.encode_gradient_result(result)
    received = model.compute_gradients(
        *batch(), wrt="0.*", input_gradients=True, outputs=True, dtype=torch.float64, training=False, seed=5
    )
    query = codec.decode_gradient_query(sent(scripted, "ComputeGradients"))
    assert query.wrt == ("0.*",) and query.gradient_dtype == "float64" and query.seed == 5
    assert query.input_gradients and query.outputs and not query.training
    assert torch.equal(received.gradients["0.weight"], gradient)
    assert torch.equal(received.outputs, outputs) and received.input_gradients.sum() == 18
    assert (received.loss, received.step, received.num_examples, received.rank_rows) == (0.5, 3, 6, (6,))


def test_outputs_come_back_in_the_module_s_own_type(sdk, hosted, scripted):
    from typing import NamedTuple

    class Both(NamedTuple):
        total: torch.Tensor
        rest: dict[str, torch.Tensor]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, 2)

        def forward(self, x):
            h = self.linear(x)
            return Both(h, {"doubled": 2 * h})

    model = sdk.create_model(Net(), example=(batch()[0],))

    def forward(request, context):
        outputs = (from_torch(torch.ones(4, 2)), {"doubled": from_torch(torch.zeros(4, 2))})
        return codec.encode_forward_result(ForwardResult(outputs=outputs, step=0))

    scripted.answers["Forward"] = forward
    x = batch(4)[0]
    out = model(x)
    assert type(out) is Both and out.total.sum() == 8 and list(out.rest) == ["doubled"]
    assert not sent(scripted, "Forward").request_id
    # Found by its id alone, the module is not at hand.
    plain = sdk.get_model(model.id).forward(x, training=True)
    assert type(plain) is tuple and plain[1]["doubled"].sum() == 0
    assert sent(scripted, "Forward").training and sent(scripted, "Forward").request_id


def test_tied_weights_come_down_as_one_tensor(sdk, hosted, scripted):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Linear(FEATURES, FEATURES, bias=False)
            self.two = nn.Linear(FEATURES, FEATURES, bias=False)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    module = Tied()
    model = sdk.create_model(module, loss="mse_loss", example=(torch.randn(2, FEATURES), torch.randn(2, FEATURES)))
    tensors = {name: from_torch(tensor) for name, tensor in module.state_dict().items()}
    scripted.answers["GetStateDict"] = lambda request, context: pb.GetStateDictResponse(
        tensors=codec.encode_named_tensors(tensors)
    )
    state = model.state_dict()
    assert list(state) == ["one.weight", "two.weight"]
    assert state["two.weight"] is state["one.weight"]


def test_deleted_and_unknown_models_are_not_found(model, sdk, scripted):
    scripted.answers["DeleteModel"] = lambda request, context: empty()
    model.delete()
    assert sent(scripted, "DeleteModel").name == "models/mine"
    assert sent(scripted, "DeleteModel").request_id, "a repeat would delete what was made since"
    with pytest.raises(errors.ModelNotFound):
        sdk.get_model("other")
    assert model.info().optimizer == optim.SGD(lr=0.5).spec()


def test_every_page_of_models_is_listed(sdk, scripted):
    names = [f"m{index}" for index in range(5)]

    def page(request, context):
        start = int(request.page_token or 0)
        end = start + 2
        models = [
            model_pb2.Model(name=f"models/{name}", state=model_pb2.MODEL_STATE_READY) for name in names[start:end]
        ]
        return pb.ListModelsResponse(models=models, next_page_token=str(end) if end < len(names) else "")

    scripted.answers["ListModels"] = page
    assert [info.id for info in sdk.list_models()] == names
