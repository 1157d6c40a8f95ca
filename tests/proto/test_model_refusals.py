"""Models, optimizers and their changes that the codec refuses: each by its field and the bound, never by a crash."""

from __future__ import annotations

import pytest
from proto.codec_messages import model_message, refusal

from gradwire_proto import codec, values
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.v1 import model_pb2

NOT_DURABLE = model_pb2.DURABILITY_NONE


@pytest.mark.parametrize(
    ("fields", "reason", "field"),
    [
        ({"workers": -2}, "INTEGER_OUT_OF_RANGE", "model.workers"),
        ({"device": 9}, "ENUM_VALUE_UNKNOWN", "model.device"),
        ({"on_nan": 9}, "ENUM_VALUE_UNKNOWN", "model.on_nan"),
        ({"precision": 9}, "ENUM_VALUE_UNKNOWN", "model.precision"),
        ({"loss_reduction": 9}, "ENUM_VALUE_UNKNOWN", "model.loss_reduction"),
        ({"durability": 9}, "ENUM_VALUE_UNKNOWN", "model.durability"),
        ({"checkpoint_every": -1}, "INTEGER_OUT_OF_RANGE", "model.checkpoint_every"),
        ({"keep_checkpoints": -1}, "INTEGER_OUT_OF_RANGE", "model.keep_checkpoints"),
        ({"durability": NOT_DURABLE, "checkpoint_every": 5}, "CHECKPOINTS_NOT_TAKEN", "model.checkpoint_every"),
        ({"durability": NOT_DURABLE, "keep_checkpoints": 5}, "CHECKPOINTS_NOT_TAKEN", "model.keep_checkpoints"),
        ({"gpus_per_worker": -1.0}, "NUMBER_OUT_OF_RANGE", "model.gpus_per_worker"),
        ({"gpus_per_worker": float("nan")}, "NUMBER_OUT_OF_RANGE", "model.gpus_per_worker"),
        ({"gpus_per_worker": 1.0, "device": model_pb2.DEVICE_CPU}, "GPUS_ON_CPU", "model.gpus_per_worker"),
        ({"labels": {"k": "v" * 64}}, "LABEL_TOO_LONG", 'model.labels["k"]'),
        ({"labels": {str(index): "" for index in range(65)}}, "TOO_MANY_LABELS", "model.labels"),
        ({"name": "models/mine"}, "FIELD_NOT_SETTABLE", "model.name"),
        ({"step": 3}, "FIELD_NOT_SETTABLE", "model.step"),
        ({"rank_rows": [1]}, "FIELD_NOT_SETTABLE", "model.rank_rows"),
    ],
)
def test_model_that_the_service_would_not_honour_is_refused(fields: dict, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_model_spec(model_message(**fields)))
    assert (error.reason, error.field) == (reason, field)


def test_model_that_leaves_settings_out_gets_the_documented_ones() -> None:
    message = model_message()
    message.ClearField("workers")
    spec = codec.decode_model_spec(message)
    assert (spec.workers, spec.device, spec.on_nan, spec.gpus_per_worker) == (1, "auto", "report", 0.0)
    message.device = model_pb2.DEVICE_CUDA
    assert codec.decode_model_spec(message).gpus_per_worker == 1.0


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["clip_grad_norm", "clip_grad_value"])
def test_bound_of_gradients_out_of_range_is_refused(name: str, bound: float) -> None:
    error = refusal(lambda: codec.decode_model_spec(model_message(**{name: bound})))
    assert (error.reason, error.field) == ("NUMBER_OUT_OF_RANGE", f"model.{name}")


def schedule_of_schedules(levels: int) -> model_pb2.Schedule:
    message = model_pb2.Schedule(name="ChainedScheduler")
    inner = message
    for _ in range(levels - 1):
        inner = inner.schedulers.add(name="ChainedScheduler")
    return message


@pytest.mark.parametrize(
    ("optimizer", "reason", "field"),
    [
        (model_pb2.Optimizer(), "NAME_MISSING", "optimizer.name"),
        (model_pb2.Optimizer(name="SGD", groups=[{}]), "NAME_MISSING", "optimizer.groups[0].pattern"),
        (model_pb2.Optimizer(name="SGD", schedule={}), "NAME_MISSING", "optimizer.schedule.name"),
        (
            model_pb2.Optimizer(name="SGD", schedule={"name": "ChainedScheduler", "schedulers": [{}]}),
            "NAME_MISSING",
            "optimizer.schedule.schedulers[0].name",
        ),
        (
            model_pb2.Optimizer(name="SGD", schedule=schedule_of_schedules(9)),
            "NESTING_TOO_DEEP",
            "optimizer.schedule" + 8 * ".schedulers[0]",
        ),
        (
            model_pb2.Optimizer(name="SGD", groups=[{"pattern": "*", "options": {"entries": [{"key": "lr"}]}}]),
            "FIELD_MISSING",
            "optimizer.groups[0].options.lr",
        ),
    ],
)
def test_optimizer_that_is_not_whole_is_refused(optimizer: model_pb2.Optimizer, reason: str, field: str) -> None:
    error = refusal(lambda: codec.decode_optimizer(optimizer))
    assert (error.reason, error.field) == (reason, field)
    codec.decode_optimizer(model_pb2.Optimizer(name="SGD", schedule=schedule_of_schedules(8)))


def test_schedule_nested_too_deeply_is_refused_before_it_is_sent() -> None:
    nested = values.ScheduleSpec("StepLR")
    for _ in range(8):
        nested = values.ScheduleSpec("ChainedScheduler", {}, (nested,))
    error = refusal(lambda: codec.encode_optimizer(values.OptimizerSpec("SGD", schedule=nested)))
    assert error.reason == "NESTING_TOO_DEEP"


def test_state_of_an_optimizer_must_be_there() -> None:
    error = refusal(lambda: codec.decode_optimizer_state(pb.LoadOptimizerStateRequest()))
    assert (error.reason, error.field) == ("FIELD_MISSING", "state")


@pytest.mark.parametrize(
    ("request_", "reason", "field"),
    [
        (pb.UpdateModelRequest(name="models/m"), "NOTHING_TO_UPDATE", None),
        (pb.UpdateModelRequest(learning_rate=-1.0), "NUMBER_OUT_OF_RANGE", "learning_rate"),
        (pb.UpdateModelRequest(learning_rate=float("nan")), "NUMBER_OUT_OF_RANGE", "learning_rate"),
        (pb.UpdateModelRequest(optimizer={}), "NAME_MISSING", "optimizer.name"),
        (pb.UpdateModelRequest(trainable=[{"trainable": True}]), "NAME_MISSING", "trainable[0].pattern"),
        (pb.UpdateModelRequest(trainable=[{"pattern": "*"}] * 1025), "TOO_MANY_PATTERNS", "trainable"),
        (pb.UpdateModelRequest(labels={"labels": {"": "x"}}), "LABEL_TOO_LONG", 'labels.labels[""]'),
        (pb.UpdateModelRequest(labels={"labels": {str(n): "" for n in range(65)}}), "TOO_MANY_LABELS", "labels.labels"),
    ],
)
def test_update_out_of_bounds_is_refused(request_: pb.UpdateModelRequest, reason: str, field: str | None) -> None:
    error = refusal(lambda: codec.decode_model_update(request_))
    assert (error.reason, error.field) == (reason, field)


@pytest.mark.parametrize("rate", [-1.0, float("nan"), float("inf")])
def test_learning_rate_out_of_range_is_refused(rate: float) -> None:
    error = refusal(lambda: codec.decode_learning_rate(pb.TrainStepRequest(learning_rate=rate)))
    assert (error.reason, error.field) == ("NUMBER_OUT_OF_RANGE", "learning_rate")


def test_learning_rate_of_zero_differs_from_none() -> None:
    assert codec.decode_learning_rate(pb.TrainStepRequest(learning_rate=0.0)) == 0.0
    assert codec.decode_learning_rate(pb.OptimizerStepRequest()) is None
