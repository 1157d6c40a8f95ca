"""What creating a model sends, refuses, and undoes."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from client.one_model import batch, empty, net
from torch import nn

import gradwire
from gradwire import errors, optim
from gradwire_proto import codec
from gradwire_proto.tensors import from_torch, to_torch
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

# What a busy machine may add to a timeout of two seconds: still no hang.
SLACK = 0.7


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
        sync_batch_norm=False,
    )
    spec = codec.decode_model_spec(hosted.created.model)
    assert model.id == hosted.created.model_id == "mine"
    assert (spec.workers, spec.seed, spec.device, spec.on_nan) == (3, 7, "cpu", "refuse")
    assert spec.require_sharding and spec.labels == {"team": "vision"}
    assert (spec.durability, spec.checkpoint_every, spec.keep_checkpoints) == ("disk", 50, 2)
    assert spec.deterministic and not spec.sync_batch_norm
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
    # Left out, as in what was stored before there was a choice.
    assert not hosted.created.model.HasField("sync_batch_norm")
    assert codec.decode_model_spec(hosted.created.model).sync_batch_norm
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
        ({"sync_batch_norm": 1}, "model.sync_batch_norm"),
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
    scripted.answers["DeleteModel"] = lambda request, context: deleted.set() or empty()
    with (
        gradwire.connect(scripted.target, timeout=1.5) as sdk,
        pytest.raises(errors.DeadlineExceeded),
    ):
        sdk.create_model(net(), loss="cross_entropy", example=batch())
    assert deleted.is_set()
    (undo,), (creation,) = scripted.requests("DeleteModel"), scripted.requests("CreateModel")
    # Somebody else's model may have the id by then.
    assert (undo.name, undo.made_by) == (f"models/{creation.model_id}", creation.request_id)


def test_creation_that_nothing_answers_is_undone_within_its_time(scripted, hosted):
    arrived: list[float] = []

    def never(request, context):
        arrived.append(time.monotonic())
        return scripted.release.wait(10) and empty()

    scripted.answers |= dict.fromkeys(("CreateModel", "GetCommand", "DeleteModel"), never)
    with (
        gradwire.connect(scripted.target, timeout=2.0) as sdk,
        pytest.raises(errors.Unavailable) as caught,
    ):
        sdk.create_model(net(), loss="cross_entropy", example=batch())
    assert time.monotonic() - arrived[0] < 2.0 + SLACK
    assert caught.value.outcome == "unknown" and "within 2 s" in caught.value.message
    assert len(scripted.requests("DeleteModel")) == 1
