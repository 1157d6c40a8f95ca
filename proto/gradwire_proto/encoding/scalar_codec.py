"""Checks of numbers, names and unknown fields that every part of the codec shares."""

from __future__ import annotations

import math
from collections.abc import Iterator

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from gradwire_proto.errors import InvalidArgument

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
INT32_MAX = 2**31 - 1


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


def refuse_unknown_fields(message: Message, field: str = "", *, deep: bool = False) -> None:
    """Refuse fields that this version of the contract does not know: to ignore one could change the numbers.

    `deep` looks into nested messages too. It copies the message: for what is sent once and holds no tensors.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidArgument(
            f"this service's {message.DESCRIPTOR.name} has no field number {unknown[0].field_number}",
            field=field or None,
            reason="UNKNOWN_FIELD",
        )
    if deep and _holds_unknown_fields(message):
        for path, child in _children(message, field):
            refuse_unknown_fields(child, path, deep=True)


def _holds_unknown_fields(message: Message) -> bool:
    copy = type(message)()
    copy.CopyFrom(message)
    copy.DiscardUnknownFields()  # In C, where a walk in Python would take as long as decoding.
    return copy.ByteSize() != message.ByteSize()


def _children(message: Message, field: str) -> Iterator[tuple[str, Message]]:
    for descriptor, value in message.ListFields():
        path = f"{field}.{descriptor.name}" if field else descriptor.name
        if isinstance(value, Message):
            yield path, value
        elif descriptor.message_type is not None and not descriptor.message_type.GetOptions().map_entry:
            yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
