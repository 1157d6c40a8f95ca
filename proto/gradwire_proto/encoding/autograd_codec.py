"""Forwards that are retained, and their backward, to messages and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradwire_proto.encoding.result_codec import decode_timing, encode_timing
from gradwire_proto.encoding.scalar_codec import check_integer, check_name, missing
from gradwire_proto.encoding.tensor_codec import decode_options, decode_value, encode_options, encode_value
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import gradient_service_pb2 as pb
from gradwire_proto.values import BackwardQuery, BackwardResult, Limits, Retention, TensorData, Value

_RETAINED = re.compile(r"[0-9a-f]{32}")


def encode_retention(value: Retention, into: pb.Retention | None = None) -> pb.Retention:
    """The message of what a forward keeps. `wrt=()`: no parameter gradients."""
    message = pb.Retention() if into is None else into
    message.SetInParent()
    if value.wrt is not None:
        message.wrt.extend(value.wrt)
        message.no_parameter_gradients = not value.wrt
    message.inputs.extend(value.inputs)
    message.release.extend(value.release)
    return message


def decode_retention(message: pb.Retention, field: str = "retain") -> Retention:
    """What a forward keeps. Whether such parameters and leaves are there is for the ranks to say."""
    inputs = [check_integer(each, f"{field}.inputs[{index}]", minimum=0) for index, each in enumerate(message.inputs)]
    if len(set(inputs)) < len(inputs):
        raise InvalidArgument("a leaf stands twice", field=f"{field}.inputs", reason="DUPLICATE")
    return Retention(
        wrt=_decode_wrt(message, f"{field}."),
        inputs=tuple(inputs),
        release=decode_retained_names(message.release, f"{field}.release"),
    )


def encode_backward_query(value: BackwardQuery, into: pb.BackwardRequest) -> pb.BackwardRequest:
    """Write what is asked for into the request. `wrt=()`: no parameter gradients."""
    into.retained = value.retained
    if value.wrt is not None:
        into.wrt.extend(value.wrt)
        into.no_parameter_gradients = not value.wrt
    into.input_gradients = value.input_gradients
    into.keep = value.keep
    return into


def decode_backward_query(message: pb.BackwardRequest) -> BackwardQuery:
    """What the request asks for."""
    return BackwardQuery(
        retained=_check_retained(message.retained, "retained"),
        wrt=_decode_wrt(message, ""),
        input_gradients=message.input_gradients,
        keep=message.keep,
    )


def decode_cotangents(message: pb.BackwardRequest, limits: Limits | None = None) -> list[TensorData | None]:
    """The cotangents of a request: tensors, one at least, and None."""
    if not message.HasField("cotangents"):
        raise missing("cotangents", "a list of tensors")
    value = decode_value(message.cotangents, "cotangents", limits)
    if not isinstance(value, list):
        raise InvalidArgument("expected a list", field="cotangents", reason="COTANGENT_MISMATCH")
    found: list[TensorData | None] = []
    for index, each in enumerate(value):
        if each is not None and not isinstance(each, TensorData):
            raise InvalidArgument(
                f"expected a tensor or none, got a {type(each).__name__}",
                field=f"cotangents[{index}]",
                reason="COTANGENT_MISMATCH",
            )
        found.append(each)
    if all(each is None for each in found):
        raise InvalidArgument("expected at least one tensor", field="cotangents", reason="COTANGENT_MISMATCH")
    return found


def encode_cotangents(value: Sequence[TensorData | None], into: pb.BackwardRequest) -> pb.BackwardRequest:
    """Write the cotangents into the request."""
    encode_value(list(value), into.cotangents, "cotangents")
    return into


def encode_backward_result(value: BackwardResult, into: pb.BackwardResponse | None = None) -> pb.BackwardResponse:
    """The answer of Backward."""
    message = pb.BackwardResponse() if into is None else into
    if value.input_gradients is not None:
        encode_value(value.input_gradients, message.input_gradients, "input_gradients")
    message.step = value.step
    encode_timing(value.timing, message.timing)
    message.rank_rows.extend(value.rank_rows)
    return message


def decode_backward_result(message: pb.BackwardResponse) -> BackwardResult:
    """What Backward answers. Tensors are TensorData, of bytes or of a Handle."""
    gradients: Any = None
    if message.HasField("input_gradients"):
        gradients = decode_value(message.input_gradients, "input_gradients")
    return BackwardResult(
        input_gradients=gradients,
        step=message.step,
        timing=decode_timing(message.timing),
        rank_rows=tuple(message.rank_rows),
    )


def decode_retained_names(names: Iterable[str], field: str) -> tuple[str, ...]:
    """Names of retained forwards."""
    return tuple(_check_retained(name, f"{field}[{index}]") for index, name in enumerate(names))


def encode_group_options(groups: Sequence[Mapping[str, Value]], into: pb.OptimizerStepRequest) -> None:
    """Write the options that parameter groups take into the request."""
    for index, options in enumerate(groups):
        encode_options(options, into.groups.add(), f"groups[{index}]")


def decode_group_options(message: pb.OptimizerStepRequest) -> tuple[dict[str, Value], ...]:
    """The options that parameter groups take, one dict for each. Whether they can be is for the ranks to say."""
    groups = tuple(decode_options(each, f"groups[{index}]") for index, each in enumerate(message.groups))
    for index, options in enumerate(groups):
        for name in options:
            check_name(name, f"groups[{index}]")
    return groups


def _decode_wrt(message: pb.Retention | pb.BackwardRequest, path: str) -> tuple[str, ...] | None:
    if message.no_parameter_gradients and message.wrt:
        raise InvalidArgument(
            "expected either names in wrt or no_parameter_gradients, got both",
            field=f"{path}wrt",
            reason="WRT_CONTRADICTION",
        )
    for index, name in enumerate(message.wrt):
        check_name(name, f"{path}wrt[{index}]")
    return () if message.no_parameter_gradients else tuple(message.wrt) or None


def _check_retained(name: str, field: str) -> str:
    if _RETAINED.fullmatch(name):
        return name
    raise InvalidArgument(
        f"expected 32 hexadecimal digits in lower case, got {name[:80]!r}", field=field, reason="RETAINED_INVALID"
    )
