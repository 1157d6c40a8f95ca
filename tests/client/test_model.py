"""Models as users see them: what their calls send, and what they make of the answers."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwire
from gradwire import errors, optim
from gradwire.variants import without_graph
from gradwire_proto import codec
from gradwire_proto.errors import ModelNotFound
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2
from gradwire_proto.values import ForwardResult, GradientResult, ModelInfo, Sharding, StepResult, Timing

FEATURES = 3
RESULT = StepResult(
    loss=0.25, step=4, num_examples=6, lr=0.1, grad_norm=2.0, timing=Timing(total=0.5), rank_rows=(3, 3)
)


class OneModel:
    """Holds the model that a client creates, and answers its calls with fixed results."""

    def __init__(self, scripted) -> None:
        self.info: ModelInfo | None = None
        self.created: pb.CreateModelRequest | None = None
        reply = lambda kind: lambda request, context: kind(result=codec.encode_step_result(RESULT))  # noqa: E731
        scripted.answers |= {
            "CreateModel": self.create,
            "GetModel": self.get,
            "AddVariant": self.add_variant,
            "TrainStep": reply(pb.TrainStepResponse),
            "ForwardBackward": reply(pb.ForwardBackwardResponse),
            "OptimizerStep": reply(pb.OptimizerStepResponse),
            "ZeroGrad": lambda request, context: pb.ZeroGradResponse(),
            "LoadStateDict": lambda request, context: pb.LoadStateDictResponse(),
        }

    def create(self, request, context):
        spec = codec.decode_model_spec(request.model)
        self.created = request
        self.info = ModelInfo(
            id=request.model_id,
            state="ready",
            step=0,
            workers=spec.workers,
            sharding=Sharding("rows", "they are independent"),
            num_parameters=8,
            optimizer=spec.optimizer,
            loss=spec.loss,
            labels=spec.labels,
            created_at=1.5,
            tensors=spec.program.tensors,
            variants=tuple(map(without_graph, spec.program.variants)),
        )
        return codec.encode_model_info(self.info)

    def get(self, request, context):
        if self.info is None or request.name != f"models/{self.info.id}":
            raise ModelNotFound(f"there is no {request.name}", reason="MODEL_NOT_FOUND")
        return codec.encode_model_info(self.info)

    def add_variant(self, request, context):
        assert self.info is not None
        return codec.encode_model_info(self.info)


@pytest.fixture
def hosted(scripted) -> OneModel:
    return OneModel(scripted)


@pytest.fixture
def sdk(scripted):
    with gradwire.connect(scripted.target, timeout=5) as sdk:
        yield sdk


def net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(FEATURES, 2), nn.BatchNorm1d(2))


def batch(rows: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, FEATURES), torch.randint(0, 2, (rows,))


@pytest.fixture
def model(sdk, hosted) -> gradwire.Model:
    return sdk.create_model(
        net(), loss=nn.CrossEntropyLoss(), optimizer=optim.SGD(lr=0.5), example=batch(), workers=2, model_id="mine"
    )


def sent(scripted, method: str):
    return scripted.requests(method)[-1]


# --- creation -----------------------------------------------------------------------------------------------------


def test_creation_sends_program_weights_example_and_every_option(sdk, hosted):
    module, (x, y) = net(), batch()
    model = sdk.create_model(
        module,
        loss=nn.CrossEntropyLoss(),
        optimizer=optim.SGD(lr=0.5, momentum=0.9),
        example=(x, y),
        workers=3,
        model_id="mine",
        seed=7,
        device="cpu",
        require_sharding=True,
        on_nan="refuse",
        labels={"team": "vision"},
        durability="disk",
        checkpoint_every=50,
        keep_checkpoints=2,
        deterministic=True,
    )
    spec = codec.decode_model_spec(hosted.created.model)
    assert model.id == hosted.created.model_id == "mine"
    assert (spec.workers, spec.seed, spec.device, spec.on_nan) == (3, 7, "cpu", "refuse")
    assert spec.require_sharding and spec.labels == {"team": "vision"}
    assert (spec.durability, spec.checkpoint_every, spec.keep_checkpoints) == ("disk", 50, 2)
    assert spec.deterministic
    assert spec.optimizer == optim.SGD(lr=0.5, momentum=0.9).spec()
    assert spec.loss.name == "cross_entropy"
    for name, tensor in codec.decode_named_tensors(hosted.created.tensors).items():
        assert torch.equal(to_torch(tensor), module.state_dict()[name]), name
    example = codec.decode_batch(hosted.created.example)
    assert torch.equal(to_torch(example.inputs), x) and torch.equal(to_torch(example.targets), y)
    assert "mine" in repr(model)


def test_model_of_one_rank_needs_no_example_on_the_service(sdk, hosted):
    model = sdk.create_model(net(), loss="cross_entropy", example=batch())
    assert not hosted.created.HasField("example")
    assert model.id == hosted.created.model_id != ""


def test_weights_of_many_bytes_go_ahead_of_the_request(sdk, hosted, scripted):
    uploaded = []

    def upload(messages, context):
        uploaded.append(b"".join(message.chunk for message in messages))
        return pb.UploadTensorsResponse(name="uploads/u")

    scripted.answers["UploadTensors"] = upload
    module = nn.Linear(1000, 1500)
    sdk.create_model(module, loss="mse_loss", example=(torch.randn(2, 1000), torch.randn(2, 1500)))
    assert uploaded[0] == b"".join(bytes(from_torch(tensor).data) for tensor in module.state_dict().values())
    assert hosted.created.ByteSize() < 100_000


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"workers": 0}, "model.workers"),
        ({"device": "tpu"}, "model.device"),
        ({"on_nan": "panic"}, "model.on_nan"),
        ({"model_id": "Not Allowed"}, "model_id"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"example": (1, 2, 3)}, "example"),
        ({"loss": "no_such_loss"}, "loss"),
        ({"seed": 0.5}, "model.seed"),
        ({"workers": 1.5}, "model.workers"),
        ({"gpus_per_worker": -1}, "model.gpus_per_worker"),
        ({"gpus_per_worker": "one"}, "model.gpus_per_worker"),
        ({"labels": {"team": 1}}, 'model.labels["team"]'),
    ],
)
def test_argument_out_of_range_names_its_field_and_nothing_is_sent(sdk, hosted, arguments, field):
    with pytest.raises(errors.InvalidArgument) as caught:
        sdk.create_model(**{"module": net(), "loss": "cross_entropy", "example": batch()} | arguments)
    assert caught.value.field == field
    assert hosted.created is None


def test_creation_that_may_have_happened_is_undone(scripted, hosted):
    deleted = threading.Event()
    scripted.answers["CreateModel"] = lambda request, context: scripted.release.wait(10) and model_pb2.Model()
    scripted.answers["GetCommand"] = lambda request, context: model_pb2.Command(
        state=model_pb2.COMMAND_STATE_APPLIED, name=request.name
    )
    scripted.answers["DeleteModel"] = lambda request, context: deleted.set() or _empty()
    with (
        gradwire.connect(scripted.target, timeout=0.6) as sdk,
        pytest.raises(errors.DeadlineExceeded),
    ):
        sdk.create_model(net(), loss="cross_entropy", example=batch())
    assert deleted.is_set()
    assert scripted.requests("DeleteModel")[0].name == f"models/{scripted.requests('CreateModel')[0].model_id}"


def _empty():
    from google.protobuf.empty_pb2 import Empty

    return Empty()


# --- calls --------------------------------------------------------------------------------------------------------


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
    scripted.answers["DeleteModel"] = lambda request, context: _empty()
    model.delete()
    assert sent(scripted, "DeleteModel").name == "models/mine"
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


# --- batches that fit none of the variants ------------------------------------------------------------------------


def test_batch_of_another_kind_gets_a_variant_of_its_own_once(sdk, hosted, scripted):
    model = sdk.create_model(Scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(2, 3))
    model.train_step(*pair(5, 3))
    assert scripted.requests("AddVariant") == []
    model.train_step(*pair(5, 4))
    model.train_step(*pair(7, 4))
    (request,) = scripted.requests("AddVariant")
    variant = codec.decode_variant(request.variant)
    assert variant.training and variant.input_leaves[0].shape == ("rows", 4)
    assert codec.decode_batch(request.example).inputs.shape == (5, 4)
    assert len(scripted.requests("TrainStep")) == 3


def test_batch_that_the_module_itself_refuses_is_an_invalid_argument_about_its_field(model, scripted):
    with pytest.raises(errors.InvalidArgument, match="expected float32") as caught:
        model.train_step(torch.randn(6, FEATURES + 1), batch()[1])
    assert type(caught.value) is errors.InvalidArgument
    assert caught.value.field == "batch.inputs" and str(FEATURES) in caught.value.message
    assert any("module itself" in note for note in caught.value.__notes__)
    assert scripted.requests("AddVariant") == scripted.requests("TrainStep") == []


def test_targets_that_no_loss_compares_with_are_refused_and_add_nothing(sdk, hosted, scripted):
    class OwnLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(FEATURES, 1)

        def forward(self, x):
            return self.linear(x).mean()

    model = sdk.create_model(OwnLoss(), optimizer=optim.SGD(), example=(batch()[0],))
    with pytest.raises(errors.InvalidArgument) as caught:
        model.train_step(*batch())
    assert caught.value.field == "batch.targets"
    assert scripted.requests("AddVariant") == []
    assert model.train_step(batch()[0]) == RESULT


def test_without_the_module_a_batch_must_fit_and_new_variants_of_others_are_found(sdk, hosted, scripted):
    model = sdk.create_model(Scale(), loss="mse_loss", optimizer=optim.SGD(), example=pair(2, 3))
    found = sdk.get_model(model.id)
    with pytest.raises(errors.InvalidArgument, match="expected float32"):
        found.train_step(*pair(2, 4))
    model.train_step(*pair(2, 4))
    variant = codec.decode_variant(scripted.requests("AddVariant")[0].variant)
    hosted.info = _with_variant(hosted.info, without_graph(variant))
    assert found.train_step(*pair(2, 4)) == RESULT


class Scale(nn.Module):
    """Takes any number of features, and does something else for odd ones: each number has a graph of its own."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.factor * x if x.shape[1] % 2 else x * self.factor


def pair(rows: int, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, features), torch.randn(rows, features)


def _with_variant(info, variant):
    from dataclasses import replace

    return replace(info, variants=(*info.variants, variant))


# --- beside a DataLoader ------------------------------------------------------------------------------------------


def test_forked_data_loader_workers_run_beside_a_client_with_calls_in_flight(model, scripted):
    x, y = batch(32)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, num_workers=2, multiprocessing_context="fork")
    futures = []
    for _ in range(2):
        for inputs, targets in loader:
            futures.append(model.futures.train_step(inputs, targets))
            model.info()
    assert [future.result(5) for future in futures] == [RESULT] * 16
    received = [codec.decode_batch(request.batch).inputs for request in scripted.requests("TrainStep")]
    assert torch.equal(torch.cat([to_torch(inputs) for inputs in received]), torch.cat([x, x]))


# --- futures ------------------------------------------------------------------------------------------------------


def test_futures_run_in_the_order_of_the_calls_and_a_blocking_call_waits_for_them(model, scripted):
    order = []

    def slow_step(request, context):
        scripted.release.wait(0.05)
        order.append(request.learning_rate)
        return pb.TrainStepResponse(result=codec.encode_step_result(RESULT))

    scripted.answers["TrainStep"] = slow_step
    x, y = batch()
    futures = [model.futures.train_step(x, y, lr=float(number)) for number in range(1, 5)]
    model.train_step(x, y, lr=5.0)
    assert order == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [future.result(1) for future in futures] == [RESULT] * 4


def test_what_a_future_was_given_may_change_at_once(model, scripted):
    x, y = batch()
    before = x.clone()
    future = model.futures.train_step(x, y)
    x.zero_()
    future.result(5)
    assert torch.equal(to_torch(codec.decode_batch(sent(scripted, "TrainStep").batch).inputs), before)


def test_future_of_a_bad_call_raises_its_error_and_others_go_on(model):
    bad = model.futures.train_step(torch.randn(6, FEATURES + 1), batch()[1])
    good = model.futures.train_step(*batch())
    with pytest.raises(errors.InvalidArgument):
        bad.result(5)
    assert good.result(5) == RESULT


async def test_futures_can_be_awaited(model):
    x, y = batch()
    step, info = await asyncio.gather(model.futures.train_step(x, y), model.futures.info())
    assert step == RESULT and info.id == "mine"
    assert await model.futures.zero_grad() is None


def test_closing_the_client_gives_up_futures_that_were_not_sent(scripted, hosted):
    sdk = gradwire.connect(scripted.target, timeout=5)
    model = sdk.create_model(net(), loss="cross_entropy", optimizer=optim.SGD(), example=batch())
    started = threading.Event()
    scripted.answers["TrainStep"] = lambda request, context: started.set() or scripted.release.wait(10)
    running, waiting = model.futures.train_step(*batch()), model.futures.train_step(*batch())
    assert started.wait(5)
    sdk.close()
    with pytest.raises(errors.Cancelled) as caught:
        waiting.result(5)
    assert caught.value.outcome == "not_applied"
    with pytest.raises(errors.Cancelled) as caught:
        running.result(5)
    assert caught.value.outcome == "unknown"
