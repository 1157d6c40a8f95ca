"""Checks of numbers, names and unknown fields that every part of the codec shares."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from math import floor
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.protobuf.unknown_fields import UnknownFieldSet

from gradwire_proto.errors import InvalidArgument
from gradwire_proto.v1.program_pb2 import Graph

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MAX = 2**31 - 1

MOST_PARTS = 131_072
"""Messages in one request: while they are looked at, nobody else is answered."""


def check_integer(value: int, field: str, *, minimum: int = INT64_MIN, maximum: int = INT64_MAX) -> int:
    """`value`, which must lie in [minimum, maximum]."""
    if not minimum <= value <= maximum:
        raise InvalidArgument(
            f"expected an integer from {minimum} to {maximum}, got {value}", field=field, reason="INTEGER_OUT_OF_RANGE"
        )
    return value


def check_number(value: float, field: str, *, minimum: float = 0.0) -> float:
    """`value`, which must be finite and at least `minimum`."""
    if not (math.isfinite(value) and value >= minimum):
        raise InvalidArgument(
            f"expected a finite number, at least {minimum:g}, got {value}", field=field, reason="NUMBER_OUT_OF_RANGE"
        )
    return value


def encode_time(seconds: float, into: Timestamp) -> None:
    """Write seconds since 1970 into a timestamp."""
    # Seconds and nanoseconds apart: as one float the nanoseconds would be rounded.
    into.seconds = floor(seconds)
    into.nanos = min(round((seconds - floor(seconds)) * 1e9), 999_999_999)


def decode_time(message: Timestamp) -> float:
    """Seconds since 1970."""
    return message.seconds + message.nanos / 1e9


def check_text(value: str, field: str) -> str:
    """`value`, which must be encodable: Python strings may hold lone surrogates, UTF-8 may not."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidArgument("expected text that UTF-8 can encode", field=field, reason="TEXT_NOT_UTF8") from None
    return value


def check_name(value: str, field: str) -> str:
    """`value`, which must not be empty."""
    if not value:
        raise InvalidArgument("expected a name, got none", field=field, reason="NAME_MISSING")
    return check_text(value, field)


def missing(field: str, expected: str) -> InvalidArgument:
    """The error for a message or oneof that must be set and is not."""
    return InvalidArgument(f"expected {expected}, got nothing", field=field, reason="FIELD_MISSING")


def duplicate(field: str) -> InvalidArgument:
    """The error for a name that stands twice in a list of named things."""
    return InvalidArgument("the name stands twice", field=field, reason="DUPLICATE_NAME")


def too_deep(field: str, maximum: int) -> InvalidArgument:
    """The error for a value that is nested too deeply."""
    return InvalidArgument(f"expected at most {maximum} levels of nesting", field=field, reason="NESTING_TOO_DEEP")


def entry(field: str, name: str) -> str:
    """The path of one named thing: `tensors["fc.weight"]`."""
    return f'{field}["{name}"]'


def refuse_unknown_fields(message: Message, field: str = "") -> None:
    """Refuse fields that this version of the contract does not know: to ignore one could change the numbers.

    Looks into nested messages too: all but entries of maps, whose unknown fields protobuf drops when it parses.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidArgument(
            f"this service's {message.DESCRIPTOR.name} has no field number {unknown[0].field_number}",
            field=field or None,
            reason="UNKNOWN_FIELD",
        )
    if _holds_unknown_fields(message):
        for path, child in _children(message, field):
            refuse_unknown_fields(child, path)


def refuse_many_parts(message: Message) -> None:
    """Refuse a message of more than MOST_PARTS messages, not counting graphs and what is in them."""
    left, waiting = MOST_PARTS, [message]
    while waiting:
        each = waiting.pop()
        if type(each) is Graph:
            continue  # The setting graph_nodes bounds it.
        singular, oneofs, repeated = _places(type(each))
        found = [name for name in singular if each.HasField(name)]
        found += [chosen for name, alternatives in oneofs if (chosen := each.WhichOneof(name)) in alternatives]
        lists = [getattr(each, name) for name in repeated]
        # Counted before they are looked at, which takes much longer.
        left -= len(found) + sum(map(len, lists))
        if left < 0:
            raise InvalidArgument(
                f"the request has more than {MOST_PARTS} parts: tensors, values and other messages in it",
                reason="MESSAGE_TOO_LARGE",
            )
        waiting += [getattr(each, name) for name in found]
        for items in lists:
            waiting += items


def _holds_unknown_fields(message: Message) -> bool:
    """Whether the message, or one in it, has any. Asked of every request, so it makes no paths and copies no tensor."""
    if len(UnknownFieldSet(message)):
        return True
    if type(message) is Graph:
        return _graph_holds_unknown_fields(message)
    singular, oneofs, repeated = _places(type(message))
    for name in singular:
        if message.HasField(name) and _holds_unknown_fields(getattr(message, name)):
            return True
    for name, alternatives in oneofs:
        chosen = message.WhichOneof(name)
        if chosen in alternatives and _holds_unknown_fields(getattr(message, chosen)):
            return True
    for name in repeated:
        for item in getattr(message, name):
            if _holds_unknown_fields(item):
                return True
    return False


def _graph_holds_unknown_fields(graph: Graph) -> bool:
    # A graph may be of many thousands of messages, and holds no tensors: C copies it sooner than Python walks it.
    copy = Graph()
    copy.CopyFrom(graph)
    copy.DiscardUnknownFields()
    return copy.ByteSize() != graph.ByteSize()


@cache
def _places(
    kind: type[Message],
) -> tuple[tuple[str, ...], tuple[tuple[str, frozenset[str]], ...], tuple[str, ...]]:
    """Where a message holds others: (fields of one, oneofs and which of their alternatives, fields of many)."""
    fields = [field for field in kind.DESCRIPTOR.fields if _holds_messages(field)]
    oneofs: dict[str, set[str]] = {}
    for field in fields:
        if field.containing_oneof is not None:
            oneofs.setdefault(field.containing_oneof.name, set()).add(field.name)
    return (
        tuple(field.name for field in fields if field.has_presence and field.containing_oneof is None),
        tuple((name, frozenset(alternatives)) for name, alternatives in oneofs.items()),
        tuple(field.name for field in fields if not field.has_presence),
    )


def _holds_messages(field: Any) -> bool:
    return field.message_type is not None and not field.message_type.GetOptions().map_entry


def _children(message: Message, field: str) -> Iterator[tuple[str, Message]]:
    for descriptor, value in message.ListFields():
        path = f"{field}.{descriptor.name}" if field else descriptor.name
        if isinstance(value, Message):
            yield path, value
        elif _holds_messages(descriptor):
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
