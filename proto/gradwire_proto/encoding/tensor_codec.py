"""Tensors, nested values and batches to messages and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from gradwire_proto.encoding.enum_words import DTYPES
from gradwire_proto.encoding.scalar_codec import (
    INT64_MAX,
    check_integer,
    check_name,
    check_text,
    duplicate,
    entry,
    missing,
    too_deep,
)
from gradwire_proto.errors import InvalidArgument, ResourceExhausted
from gradwire_proto.names import parse_handle_name
from gradwire_proto.v1 import tensor_pb2 as pb
from gradwire_proto.values import ITEM_SIZE, Batch, Handle, Limits, NamedTensors, Segment, TensorData, Value

MAX_DEPTH = 24
"""Levels of nesting of a value. Protobuf itself parses 100 levels of messages; one of ours takes three."""

MAX_DIMENSIONS = 64
"""Dimensions of a tensor, as in torch."""


def encode_tensor(value: TensorData, into: pb.Tensor | None = None) -> pb.Tensor:
    """The message of a tensor. A Segment is read from its file; a Handle stays one."""
    message = pb.Tensor() if into is None else into
    message.dtype = DTYPES.number(value.dtype, "dtype")  # pyright: ignore[reportAttributeAccessIssue]
    if value.shape:
        message.shape.extend(value.shape)
    data = value.data
    if isinstance(data, Handle):
        message.handle = data.name
    else:
        message.data = data if type(data) is bytes else _read(data) if isinstance(data, Segment) else bytes(data)
    return message


def _read(segment: Segment) -> bytes:
    with open(segment.path, "rb", buffering=0) as file:
        file.seek(segment.offset)
        return file.read(segment.nbytes)


def decode_tensor(message: pb.Tensor, field: str = "tensor", limits: Limits | None = None) -> TensorData:
    """The tensor of a message, after checking that dtype, shape and bytes agree.

    Raises InvalidArgument (TENSOR_SIZE_MISMATCH and others) and, above `limits.tensor_bytes`, ResourceExhausted.
    """
    dtype, shape = decode_tensor_type(message.dtype, message.shape, field, limits)
    size = prod(shape, start=ITEM_SIZE[dtype])
    content = message.WhichOneof("content")
    if content == "data":
        data = message.data
        if len(data) != size:
            raise InvalidArgument(
                f"{dtype}{list(shape)} has {size} bytes, got {len(data)}", field=field, reason="TENSOR_SIZE_MISMATCH"
            )
        if dtype == "bool" and data.translate(None, b"\x00\x01"):
            raise InvalidArgument("expected bool elements of 0 or 1", field=field, reason="TENSOR_NOT_BOOL")
        return TensorData(dtype, shape, data)
    if content == "handle":
        parse_handle_name(message.handle, f"{field}.handle")
        return TensorData(dtype, shape, Handle(message.handle))
    if size == 0:
        return TensorData(dtype, shape, b"")
    raise missing(field, "the tensor's data or a handle")


def decode_tensor_type(
    dtype_number: int, dimensions: Iterable[int], field: str = "tensor", limits: Limits | None = None
) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a tensor on the wire: a Tensor, an UploadHeader or a StateTensor."""
    dtype = DTYPES.words.get(dtype_number) or DTYPES.word(dtype_number, f"{field}.dtype")
    shape = tuple(dimensions)
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidArgument(
            f"expected at most {MAX_DIMENSIONS} dimensions, got {len(shape)}",
            field=f"{field}.shape",
            reason="SHAPE_INVALID",
        )
    if shape and min(shape) < 1:
        if min(shape) < 0:
            raise InvalidArgument(
                f"expected sizes of 0 or more, got {list(shape)}", field=f"{field}.shape", reason="SHAPE_INVALID"
            )
        # Torch computes strides from the other dimensions, even for a tensor without elements.
        if prod(max(size, 1) for size in shape) * ITEM_SIZE[dtype] > INT64_MAX:
            raise InvalidArgument(f"the shape {list(shape)} overflows", field=f"{field}.shape", reason="SHAPE_INVALID")
    elif limits is not None:
        size = prod(shape, start=ITEM_SIZE[dtype])
        if size > limits.tensor_bytes:
            raise ResourceExhausted(
                f"{dtype}{list(shape)} has {size} bytes, the setting tensor_bytes allows {limits.tensor_bytes}",
                field=field,
                reason="TENSOR_TOO_LARGE",
            )
    return dtype, shape


def encode_named_tensors(tensors: Mapping[str, TensorData], into: Any = None) -> Any:
    """A list of NamedTensor; appended to the repeated field `into` where one is given (which spares a copy)."""
    messages = [] if into is None else into
    for name, value in tensors.items():
        if into is None:
            message = pb.NamedTensor()
            messages.append(message)
        else:
            message = into.add()
        message.name = check_text(name, "name")
        encode_tensor(value, message.tensor)
    return messages


def decode_named_tensors(
    messages: Iterable[pb.NamedTensor], field: str = "tensors", limits: Limits | None = None
) -> NamedTensors:
    """The tensors by name, in the order of the messages. A name that stands twice is refused."""
    tensors: NamedTensors = {}
    for index, message in enumerate(messages):
        name = message.name
        if not name:
            check_name(name, f"{field}[{index}].name")
        path = entry(field, name)
        if name in tensors:
            raise duplicate(path)
        tensors[name] = decode_tensor(message.tensor, path, limits)
    return tensors


def encode_value(value: Value, into: pb.Value | None = None, field: str = "value") -> pb.Value:
    """The message of a tensor, a constant, or a nesting of them. Other types are refused, by `field`."""
    message = pb.Value() if into is None else into
    _encode_value(value, message, field, 0)
    return message


def _encode_value(value: Any, message: pb.Value, field: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise too_deep(field, MAX_DEPTH)
    if isinstance(value, TensorData):
        encode_tensor(value, message.tensor)
    elif isinstance(value, (tuple, list)):
        sequence = message.tuple if isinstance(value, tuple) else message.list
        sequence.SetInParent()
        for index, item in enumerate(value):
            _encode_value(item, sequence.items.add(), f"{field}[{index}]", depth + 1)
    elif isinstance(value, dict):
        _encode_mapping(value, message.dict, field, depth)
    elif value is None:
        message.none = 0  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, bool):
        message.boolean = value
    elif isinstance(value, int):
        message.integer = check_integer(value, field)
    elif isinstance(value, float):
        message.number = value
    elif isinstance(value, str):
        message.text = check_text(value, field)
    else:
        raise InvalidArgument(
            f"expected a tensor, tuple, list, dict, None, bool, int, float or str, got {type(value).__qualname__}",
            field=field,
            reason="VALUE_TYPE_UNSUPPORTED",
        )


def _encode_mapping(values: Mapping[str, Any], message: pb.ValueMapping, field: str, depth: int) -> None:
    message.SetInParent()
    for key, item in values.items():
        if not isinstance(key, str):
            raise InvalidArgument(
                f"expected str keys, got {type(key).__qualname__}", field=field, reason="VALUE_TYPE_UNSUPPORTED"
            )
        child = message.entries.add(key=check_text(key, field))
        _encode_value(item, child.value, f"{field}.{key}", depth + 1)


def decode_value(message: pb.Value, field: str = "value", limits: Limits | None = None) -> Value:
    """The nested value of a message. Refuses what is not set, nested too deeply, or keyed twice."""
    return _decode_value(message, field, limits, 0)


def _decode_value(message: pb.Value, field: str, limits: Limits | None, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise too_deep(field, MAX_DEPTH)
    kind = message.WhichOneof("kind")
    if kind == "tensor":
        return decode_tensor(message.tensor, field, limits)
    if kind == "tuple" or kind == "list":
        items = [
            _decode_value(item, f"{field}[{index}]", limits, depth + 1)
            for index, item in enumerate(getattr(message, kind).items)
        ]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return _decode_mapping(message.dict, field, limits, depth)
    if kind == "none":
        return None
    if kind is None:
        raise missing(field, "a value")
    return getattr(message, kind)


def _decode_mapping(message: pb.ValueMapping, field: str, limits: Limits | None, depth: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for item in message.entries:
        key = item.key
        path = f"{field}.{key}"
        if key in values:
            raise duplicate(path)
        values[key] = _decode_value(item.value, path, limits, depth + 1)
    return values


def encode_options(
    options: Mapping[str, Value], into: pb.ValueMapping | None = None, field: str = "options"
) -> pb.ValueMapping:
    """The message of keyword arguments."""
    message = pb.ValueMapping() if into is None else into
    _encode_mapping(options, message, field, 0)
    return message


def decode_options(message: pb.ValueMapping, field: str = "options", limits: Limits | None = None) -> dict[str, Value]:
    """The keyword arguments of a message."""
    return _decode_mapping(message, field, limits, 0)


def encode_batch(value: Batch, into: pb.Batch | None = None, field: str = "batch") -> pb.Batch:
    """The message of a batch. Targets of None are left out."""
    message = pb.Batch() if into is None else into
    _encode_value(value.inputs, message.inputs, f"{field}.inputs", 0)
    if value.targets is not None:
        _encode_value(value.targets, message.targets, f"{field}.targets", 0)
    return message


def decode_batch(message: pb.Batch, field: str = "batch", limits: Limits | None = None) -> Batch:
    """The batch of a message, which must have inputs. Field paths read `batch.inputs[0]`."""
    inputs = _decode_value(message.inputs, f"{field}.inputs", limits, 0)
    has_targets = message.HasField("targets")
    targets = _decode_value(message.targets, f"{field}.targets", limits, 0) if has_targets else None
    return Batch(inputs, targets)
