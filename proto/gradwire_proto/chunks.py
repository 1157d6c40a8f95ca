"""Messages that hold one chunk of bytes, made and read without a copy that protobuf would make for itself.

They are ordinary messages: protobuf reads what is made here, and what is read here protobuf may have made.
"""

from __future__ import annotations

from collections.abc import Iterable

from google.protobuf.message import Message

_LENGTH_DELIMITED = 2


class ChunkFormat:
    """The form of `kind` with nothing set but its bytes field `chunk`."""

    def __init__(self, kind: type[Message]) -> None:
        number = kind.DESCRIPTOR.fields_by_name["chunk"].number
        self._tag = number << 3 | _LENGTH_DELIMITED

    def message(self, pieces: Iterable[bytes | memoryview], nbytes: int) -> bytes:
        """The serialized message whose chunk is `pieces` one after another, `nbytes` together."""
        return b"".join((self._header(nbytes), *pieces))

    def chunk(self, message: bytes) -> memoryview | None:
        """The chunk of a serialized message, where it lies; None for a message of another form."""
        # The first byte is the tag; the length follows, seven bits a byte, the lowest first.
        if not message or message[0] != self._tag:
            return None
        length, end = 0, 1
        while end < len(message):
            length |= (message[end] & 0x7F) << 7 * (end - 1)
            end += 1
            if message[end - 1] < 0x80:
                return memoryview(message)[end:] if length == len(message) - end else None
        return None

    def _header(self, nbytes: int) -> bytes:
        header = bytearray((self._tag,))
        while nbytes >= 0x80:
            header.append(nbytes & 0x7F | 0x80)
            nbytes >>= 7
        header.append(nbytes)
        return bytes(header)
