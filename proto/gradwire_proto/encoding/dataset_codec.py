"""Datasets, and fits on them, to messages and back."""

from __future__ import annotations

from gradwire_proto.encoding.result_codec import decode_timing, encode_timing
from gradwire_proto.encoding.scalar_codec import INT64_MAX, check_integer, decode_time, encode_time, missing
from gradwire_proto.encoding.tensor_codec import decode_tensor_type, decode_value, encode_value
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.names import dataset_name, model_name, parse_dataset_name
from gradwire_proto.v1 import dataset_pb2 as pb
from gradwire_proto.v1 import tensor_pb2
from gradwire_proto.values import DatasetInfo, FitPlan, FitProgress, FitSteps, TensorData, Value

LONGEST_TTL = 30 * 86_400


def encode_dataset(value: DatasetInfo) -> pb.Dataset:
    """The message that describes a dataset."""
    message = pb.Dataset(name=dataset_name(value.id), num_examples=value.num_examples, size_bytes=value.nbytes)
    encode_value(value.inputs, message.inputs, "inputs")
    if value.targets is not None:
        encode_value(value.targets, message.targets, "targets")
    encode_time(value.created_at, message.create_time)
    if value.ttl is not None:
        message.ttl.FromNanoseconds(round(value.ttl * 1e9))
    return message


def decode_dataset(message: pb.Dataset, field: str = "dataset") -> DatasetInfo:
    """The dataset that a message describes."""
    return DatasetInfo(
        id=parse_dataset_name(message.name, f"{field}.name"),
        inputs=_described(message.inputs, f"{field}.inputs"),
        targets=_described(message.targets, f"{field}.targets") if message.HasField("targets") else None,
        num_examples=check_integer(message.num_examples, f"{field}.num_examples", minimum=1),
        nbytes=check_integer(message.size_bytes, f"{field}.size_bytes", minimum=0),
        created_at=decode_time(message.create_time),
        ttl=decode_ttl(message, f"{field}.ttl"),
    )


def decode_ttl(message: pb.Dataset | pb.CreateDatasetRequest, field: str = "ttl") -> float | None:
    """The seconds of a message's `ttl`; None where it has none."""
    if not message.HasField("ttl"):
        return None
    seconds = message.ttl.seconds + message.ttl.nanos / 1e9
    if not 0 < seconds <= LONGEST_TTL:
        expected = f"expected more than 0 and at most {LONGEST_TTL} seconds"
        raise InvalidArgument(f"{expected}, got {seconds:g}", field=field, reason="NUMBER_OUT_OF_RANGE")
    return seconds


def _described(message: tensor_pb2.Value, field: str) -> Value:
    """A nested value whose tensors have type and shape alone."""
    match message.WhichOneof("kind"):
        case "tensor":
            return TensorData(*decode_tensor_type(message.tensor.dtype, message.tensor.shape, field), b"")
        case "tuple":
            return tuple(_described(item, f"{field}[{index}]") for index, item in enumerate(message.tuple.items))
        case "list":
            return [_described(item, f"{field}[{index}]") for index, item in enumerate(message.list.items)]
        case "dict":
            return {each.key: _described(each.value, f"{field}.{each.key}") for each in message.dict.entries}
    return decode_value(message, field)


def encode_fit_plan(value: FitPlan, model_id: str, request_id: str) -> pb.FitRequest:
    """The request of a fit of this model."""
    return pb.FitRequest(
        name=model_name(model_id),
        dataset=dataset_name(value.dataset),
        epochs=value.epochs,
        batch_size=value.batch_size or 0,
        shuffle=value.shuffle,
        seed=value.seed,
        validation_dataset="" if value.validation is None else dataset_name(value.validation),
        request_id=request_id,
        completed_steps=value.completed_steps,
        stop=value.stop,
    )


def decode_fit_plan(message: pb.FitRequest) -> FitPlan:
    """What a request asks for. A fit is known by its request id: there must be one."""
    if not message.request_id:
        raise missing("request_id", "a UUID, by which the fit goes on after its connection broke")
    epochs = check_integer(message.epochs, "epochs", minimum=1)
    check_integer(message.seed, "seed", maximum=INT64_MAX - (epochs if message.shuffle else 0))
    return FitPlan(
        dataset=parse_dataset_name(message.dataset, "dataset"),
        epochs=epochs,
        batch_size=check_integer(message.batch_size, "batch_size", minimum=0) or None,
        shuffle=message.shuffle,
        seed=message.seed,
        validation=parse_dataset_name(message.validation_dataset, "validation_dataset")
        if message.validation_dataset
        else None,
        completed_steps=check_integer(message.completed_steps, "completed_steps", minimum=0),
        stop=message.stop,
    )


def encode_fit_progress(value: FitProgress) -> pb.FitResponse:
    """The message of some progress."""
    message = pb.FitResponse(
        first_step=value.first_step,
        losses=value.losses,
        step=value.step,
        epoch=value.epoch,
        validation_loss=value.validation_loss,
        done=value.done,
    )
    encode_timing(value.timing, message.timing)
    return message


def decode_fit_progress(message: pb.FitResponse) -> FitProgress:
    """The progress of a message."""
    return FitProgress(
        first_step=message.first_step,
        losses=tuple(message.losses),
        step=message.step,
        epoch=message.epoch,
        validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
        timing=decode_timing(message.timing),
        done=message.done,
    )


def encode_fit_steps(value: FitSteps, model_id: str, request_id: str) -> pb.FitStepsRequest:
    """The record of some steps of a fit of this model."""
    return pb.FitStepsRequest(
        name=model_name(model_id),
        fit=value.fit,
        dataset=encode_dataset(value.dataset),
        first_step=value.first_step,
        steps=value.steps,
        batch_size=value.batch_size,
        seed=value.seed,
        rows=value.rows,
        validation_loss=value.validation_loss,
        request_id=request_id,
    )


def decode_fit_steps(message: pb.FitStepsRequest) -> FitSteps:
    """The steps of a record."""
    return FitSteps(
        fit=message.fit,
        dataset=decode_dataset(message.dataset),
        first_step=message.first_step,
        steps=message.steps,
        batch_size=message.batch_size,
        seed=message.seed if message.HasField("seed") else None,
        rows=message.rows,
        validation_loss=message.validation_loss if message.HasField("validation_loss") else None,
    )
