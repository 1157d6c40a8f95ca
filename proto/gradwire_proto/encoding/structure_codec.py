"""How batches are nested, and what their leaves must be, to messages and back."""

from __future__ import annotations

from typing import Any

from gradwire_proto.encoding.enum_words import DTYPES
from gradwire_proto.encoding.scalar_codec import check_integer, check_name, check_text, duplicate, missing, too_deep
from gradwire_proto.encoding.tensor_codec import MAX_DEPTH, decode_value, encode_value
from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1 import program_pb2 as pb
from gradwire_proto.values import ConstantSpec, Leaf, LeafRef, Structure, Symbol, TensorSpec


def encode_structure(value: Structure, into: pb.Structure | None = None, field: str = "structure") -> pb.Structure:
    """The message of a nesting of leaves."""
    message = pb.Structure() if into is None else into
    _encode_structure(value, message, field, 0)
    return message


def _encode_structure(value: Any, message: pb.Structure, field: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise too_deep(field, MAX_DEPTH)
    if isinstance(value, LeafRef):
        message.leaf = value.index
    elif isinstance(value, (tuple, list)):
        sequence = message.tuple if isinstance(value, tuple) else message.list
        sequence.SetInParent()
        for index, item in enumerate(value):
            _encode_structure(item, sequence.items.add(), f"{field}[{index}]", depth + 1)
    elif isinstance(value, dict):
        message.dict.SetInParent()
        for key, item in value.items():
            child = message.dict.entries.add(key=check_text(key, field))
            _encode_structure(item, child.value, f"{field}.{key}", depth + 1)
    else:
        message.none = 0  # pyright: ignore[reportAttributeAccessIssue]


def decode_structure(message: pb.Structure, field: str = "structure") -> Structure:
    """The nesting of leaves of a message, which must be set."""
    return _decode_structure(message, field, 0)


def _decode_structure(message: pb.Structure, field: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise too_deep(field, MAX_DEPTH)
    kind = message.WhichOneof("kind")
    if kind == "leaf":
        return LeafRef(check_integer(message.leaf, field, minimum=0))
    if kind == "tuple" or kind == "list":
        items = [
            _decode_structure(item, f"{field}[{index}]", depth + 1)
            for index, item in enumerate(getattr(message, kind).items)
        ]
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        entries: dict[str, Any] = {}
        for item in message.dict.entries:
            path = f"{field}.{item.key}"
            if item.key in entries:
                raise duplicate(path)
            entries[item.key] = _decode_structure(item.value, path, depth + 1)
        return entries
    if kind == "none":
        return None
    raise missing(field, "a structure")


def encode_leaf(value: Leaf, into: pb.Leaf | None = None, field: str = "leaf") -> pb.Leaf:
    """The message of what a leaf of a batch must be."""
    message = pb.Leaf() if into is None else into
    if isinstance(value, ConstantSpec):
        encode_value(value.value, message.constant, field)
        return message
    message.tensor.dtype = DTYPES.number(value.dtype, field)  # pyright: ignore[reportAttributeAccessIssue]
    for size in value.shape:
        if isinstance(size, str):
            message.tensor.shape.add(symbol=size)
        else:
            message.tensor.shape.add(size=size)
    return message


def decode_leaf(message: pb.Leaf, field: str = "leaf") -> Leaf:
    """What a leaf of a batch must be: a tensor of a type and shape, or a bool, int, float or str."""
    kind = message.WhichOneof("kind")
    if kind == "tensor":
        dtype = DTYPES.word(message.tensor.dtype, f"{field}.tensor.dtype")
        path = f"{field}.tensor.shape"
        return TensorSpec(
            dtype, tuple(_decode_dimension(item, f"{path}[{i}]") for i, item in enumerate(message.tensor.shape))
        )
    if kind == "constant":
        value = decode_value(message.constant, f"{field}.constant")
        if not isinstance(value, (bool, int, float, str)):
            raise InvalidArgument(
                "expected a bool, int, float or str", field=f"{field}.constant", reason="VALUE_TYPE_UNSUPPORTED"
            )
        return ConstantSpec(value)
    raise missing(field, "a leaf")


def _decode_dimension(message: pb.Dimension, field: str) -> int | str:
    kind = message.WhichOneof("kind")
    if kind == "size":
        return check_integer(message.size, field, minimum=0)
    if kind == "symbol":
        return check_name(message.symbol, f"{field}.symbol")
    raise missing(field, "a size or a symbol")


def encode_symbol(value: Symbol, into: pb.Symbol | None = None, field: str = "symbol") -> pb.Symbol:
    """The message of a size that may vary."""
    message = pb.Symbol() if into is None else into
    message.name = value.name
    message.min = check_integer(value.min, f"{field}.min", minimum=0)
    if value.max is not None:
        # On the wire 0 means "no bound", so no bound can be 0.
        message.max = check_integer(value.max, f"{field}.max", minimum=max(value.min, 1))
    return message


def decode_symbol(message: pb.Symbol, field: str = "symbol") -> Symbol:
    """The size that may vary, of a message."""
    smallest = check_integer(message.min, f"{field}.min", minimum=0)
    largest = check_integer(message.max, f"{field}.max", minimum=max(smallest, 1)) if message.max else None
    return Symbol(check_name(message.name, f"{field}.name"), smallest, largest)
