"""Optimizers, their parameter groups and their schedules to messages and back, and what bounds gradients."""

from __future__ import annotations

from gradwire_proto.encoding.scalar_codec import check_name, check_number, missing, too_deep
from gradwire_proto.encoding.tensor_codec import decode_options, decode_value, encode_options
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as service_pb
from gradwire_proto.v1 import model_pb2 as pb
from gradwire_proto.values import Limits, OptimizerSpec, ParameterGroupSpec, ScheduleSpec, Value

MAX_SCHEDULE_DEPTH = 8
"""Levels of schedules that are made of schedules."""


def encode_optimizer(value: OptimizerSpec, into: pb.Optimizer | None = None, field: str = "optimizer") -> pb.Optimizer:
    """The message of an optimizer."""
    message = pb.Optimizer() if into is None else into
    message.name = value.name
    encode_options(value.options, message.options, f"{field}.options")
    for index, group in enumerate(value.groups):
        child = message.groups.add(pattern=group.pattern)
        encode_options(group.options, child.options, f"{field}.groups[{index}].options")
    if value.schedule is not None:
        _encode_schedule(value.schedule, message.schedule, f"{field}.schedule", 1)
    return message


def decode_optimizer(message: pb.Optimizer, field: str = "optimizer", limits: Limits | None = None) -> OptimizerSpec:
    """The optimizer of a message. Whether it exists and takes its options is for the ranks' tables."""
    schedule = None
    if message.HasField("schedule"):
        schedule = _decode_schedule(message.schedule, f"{field}.schedule", limits, 1)
    return OptimizerSpec(
        name=check_name(message.name, f"{field}.name"),
        options=decode_options(message.options, f"{field}.options", limits),
        groups=tuple(
            ParameterGroupSpec(
                check_name(group.pattern, f"{field}.groups[{index}].pattern"),
                decode_options(group.options, f"{field}.groups[{index}].options", limits),
            )
            for index, group in enumerate(message.groups)
        ),
        schedule=schedule,
    )


def _encode_schedule(value: ScheduleSpec, message: pb.Schedule, field: str, depth: int) -> None:
    if depth > MAX_SCHEDULE_DEPTH:
        raise too_deep(field, MAX_SCHEDULE_DEPTH)
    message.name = value.name
    encode_options(value.options, message.options, f"{field}.options")
    for index, part in enumerate(value.schedulers):
        _encode_schedule(part, message.schedulers.add(), f"{field}.schedulers[{index}]", depth + 1)


def _decode_schedule(message: pb.Schedule, field: str, limits: Limits | None, depth: int) -> ScheduleSpec:
    if depth > MAX_SCHEDULE_DEPTH:
        raise too_deep(field, MAX_SCHEDULE_DEPTH)
    return ScheduleSpec(
        name=check_name(message.name, f"{field}.name"),
        options=decode_options(message.options, f"{field}.options", limits),
        schedulers=tuple(
            _decode_schedule(part, f"{field}.schedulers[{index}]", limits, depth + 1)
            for index, part in enumerate(message.schedulers)
        ),
    )


def decode_clip(message: pb.Model, name: str, field: str) -> float | None:
    """A bound of gradients, above 0; None where the message has none of that name."""
    if not message.HasField(name):  # pyright: ignore[reportArgumentType]
        return None
    bound = check_number(getattr(message, name), field)
    if bound == 0:
        raise InvalidArgument(
            "expected a number above 0; leave it out where nothing is to be clipped",
            field=field,
            reason="NUMBER_OUT_OF_RANGE",
        )
    return bound


def decode_optimizer_state(
    message: service_pb.GetOptimizerStateResponse | service_pb.LoadOptimizerStateRequest, limits: Limits | None = None
) -> Value:
    """An optimizer's state. Whether it fits a model is for the ranks to say."""
    if not message.HasField("state"):
        raise missing("state", "an optimizer's state")
    return decode_value(message.state, "state", limits)
