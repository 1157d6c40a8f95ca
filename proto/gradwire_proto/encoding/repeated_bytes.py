"""Messages whose one field is a list of messages, as the bytes of these: what has the same form on the wire."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from gradwire_proto.encoding.scalar_codec import refuse_unknown_fields


def _message_of_bytes() -> Any:
    """message Items { repeated bytes items = 1; }"""
    file = descriptor_pb2.FileDescriptorProto(name="gradwire/items.proto", package="gradwire.internal", syntax="proto3")
    kind = descriptor_pb2.FieldDescriptorProto
    field = kind(name="items", number=1, label=kind.LABEL_REPEATED, type=kind.TYPE_BYTES)
    file.message_type.add(name="Items", field=[field])
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # pyright: ignore[reportAttributeAccessIssue]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gradwire.internal.Items"))


_Items = _message_of_bytes()


def split_items(raw: bytes) -> list[bytes]:
    """The serialized members of field 1. Raises protobuf's DecodeError, and InvalidArgument UNKNOWN_FIELD."""
    message = _Items.FromString(raw)
    refuse_unknown_fields(message)
    return list(message.items)


def join_items(items: Iterable[bytes]) -> bytes:
    """The message whose field 1 has these serialized members, each copied once."""
    return b"".join([part for item in items for part in (_start(len(item)), item)])


@lru_cache(maxsize=256)
def _start(size: int) -> bytes:
    """The tag of field 1, and the size as a varint."""
    start = bytearray(b"\x0a")
    while size > 0x7F:
        start.append(size & 0x7F | 0x80)
        size >>= 7
    start.append(size)
    return bytes(start)
