"""How one command stands in a journal, byte by byte.

A record is a header, a description in JSON, the request, the reply and a trailer; all numbers are little-endian:

    header    "GWRC", flags (2 bytes), unsynced (2), length of the description (4), of the request (8), of the reply
              (8), number (8), CRC-32 of the header so far (4)
    trailer   CRC-32 of all before it (4), "END\\n" (4)

Flags are 1: there is a reply; 2: the fingerprint in the description checks the request, which the trailer's CRC leaves
out: so the request is read once, at the speed of memory; 4: the command was refused and has no number, so that this is
the number of the command before. Unsynced is one more than how many commands up to this one no fsync had made durable
when it was written, 65535 where they were too many, and 0 where none is made. Both CRCs go on from a seed that the
segment gives, so that no record of another one is taken for its own. The last byte of a record is never zero: zeros at
the end of a journal are room that was never written to.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from gradwire_proto.values import SplitDecision
from gradwire_server.fingerprints import fingerprint

_HEADER = struct.Struct("<4sHHIQQQ")
_CHECK = struct.Struct("<I")
_TRAILER = struct.Struct("<I4s")
_END = b"END\n"
_HAS_REPLY = 1
_BODY_CHECKS = 2
_UNNUMBERED = 4
_MOST_UNSYNCED = 0xFFFF
_METHOD = re.compile(r"[A-Za-z]+")
_UUID = re.compile(r"[0-9a-fA-F-]{36}")
_to_json = json.JSONEncoder(separators=(",", ":")).encode

BEGIN = b"GWRC"
HEADER_BYTES = _HEADER.size + _CHECK.size
TRAILER_BYTES = _TRAILER.size
REPLY_BYTES = 4 << 20
"""Replies that are larger are not stored: a repeat of the request hears that it was applied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where one tensor lies in the file of an upload; `offset` and `nbytes` in bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredUpload:
    """An upload that a request names: `name` is "uploads/{upload}", `file` its name among the model's blobs.

    fingerprint: the file's; None: an older version wrote the record, or there is no file.
    """

    name: str
    file: str
    tensors: tuple[StoredTensor, ...]
    fingerprint: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One command. `request` and `reply` are messages as they travelled, `body` the digest in Call.body.

    number: the command's; of several steps that were applied as one, which count as `commands`, the last one's.
    body_checks: whether `body` is the fingerprint of just this request, so that it serves as its checksum.
    reply: None where it is larger than REPLY_BYTES, or the command was refused.
    refused: why a command that killed its ranks twice was not carried out; None for every other.
    unnumbered: whether such a command has no number of its own: `number` is that of the command before. Those that were
    written first have one.
    released: names of retained forwards that were let go of since the command before.
    splits: how batches of the variants that it brought are spread, as was found out then, by variant.
    """

    number: int
    method: str
    request: bytes | memoryview
    reply: bytes | None
    request_id: str | None
    body: bytes
    body_checks: bool = False
    commands: int = 1
    refused: str | None = None
    unnumbered: bool = False
    uploads: tuple[StoredUpload, ...] = ()
    released: tuple[str, ...] = ()
    splits: Mapping[str, SplitDecision] = field(default_factory=dict)

    def is_behind(self, number: int) -> bool:
        """Whether it came after command `number`."""
        return self.number >= number if self.unnumbered else self.number > number

    @property
    def first(self) -> int:
        """The number of the first of its commands."""
        return self.number - self.commands + 1


@dataclass(frozen=True, slots=True)
class Header:
    """What a record's header says; lengths in bytes."""

    has_reply: bool
    body_checks: bool
    unnumbered: bool
    description: int
    request: int
    reply: int
    number: int
    unsynced: int

    @property
    def synced(self) -> int | None:
        """The last command that was durable when this was written, as far as it says; None: it says nothing."""
        if not self.unsynced:
            return None
        return -1 if self.unsynced == _MOST_UNSYNCED else self.number + 1 - self.unsynced

    @property
    def nbytes(self) -> int:
        """The whole record's."""
        return HEADER_BYTES + self.description + self.request + self.reply + TRAILER_BYTES


class BadRecord(Exception):
    """Bytes that are no record of this segment; the text says why."""


def encode(entry: Entry, seed: int, synced: int | None = None) -> tuple[bytes | memoryview, ...]:
    """The record's parts, in order; the request is one of them, not copied. None of them is empty.

    synced: the last command that is durable; None: nothing is said of that.
    """
    assert entry.refused is not None or not entry.unnumbered, "a command that was applied has a number"
    description = _description(entry).encode()
    reply = entry.reply if entry.reply is not None and len(entry.reply) <= REPLY_BYTES else None
    flags = _flag(_HAS_REPLY, reply is not None) | _flag(_BODY_CHECKS, entry.body_checks)
    flags |= _flag(_UNNUMBERED, entry.unnumbered)
    unsynced = 0 if synced is None else min(entry.number + 1 - synced, _MOST_UNSYNCED)
    lengths = (len(description), len(entry.request), len(reply or b""))
    start = _HEADER.pack(BEGIN, flags, unsynced, *lengths, entry.number)
    start += _CHECK.pack(zlib.crc32(start, seed))
    checked = (start, description, b"" if entry.body_checks else entry.request, reply or b"")
    parts = (start, description, entry.request, reply or b"", _TRAILER.pack(_crc(checked, seed), _END))
    return tuple(part for part in parts if len(part))


def decode_header(data: memoryview, seed: int) -> Header:
    """The header at the start of `data`, which holds HEADER_BYTES at least. Raises BadRecord."""
    begin, flags, unsynced, description, request, reply, number = _HEADER.unpack_from(data)
    (check,) = _CHECK.unpack_from(data, _HEADER.size)
    if begin != BEGIN or check != zlib.crc32(data[: _HEADER.size], seed):
        raise BadRecord("no record begins here, or its header is damaged")
    if flags & ~(_HAS_REPLY | _BODY_CHECKS | _UNNUMBERED):
        raise BadRecord(f"its flags {flags:#x} are not known here")
    return Header(
        has_reply=bool(flags & _HAS_REPLY),
        body_checks=bool(flags & _BODY_CHECKS),
        unnumbered=bool(flags & _UNNUMBERED),
        description=description,
        request=request,
        reply=reply,
        number=number,
        unsynced=unsynced,
    )


def decode(header: Header, record: memoryview, seed: int) -> Entry:
    """The entry in `record`, which is all of it. The request is a part of `record`, not copied. Raises BadRecord."""
    check, end = _TRAILER.unpack_from(record, header.nbytes - TRAILER_BYTES)
    request = HEADER_BYTES + header.description
    reply = request + header.request
    checked = (record[:request], b"" if header.body_checks else record[request:reply], record[reply:-TRAILER_BYTES])
    if end != _END or check != _crc(checked, seed):
        raise BadRecord(f"the record of command {header.number} is damaged: its checksum differs")
    try:
        words = json.loads(bytes(record[HEADER_BYTES:request]))
        entry = Entry(
            number=header.number,
            request=record[request:reply],
            reply=bytes(record[reply:-TRAILER_BYTES]) if header.has_reply else None,
            method=words["method"],
            request_id=words.get("request_id"),
            body=bytes.fromhex(words["body"]),
            body_checks=header.body_checks,
            commands=words.get("commands", 1),
            refused=words["refused"] if header.unnumbered else words.get("refused"),
            unnumbered=header.unnumbered,
            uploads=tuple(_upload(*parts) for parts in words.get("uploads", ())),
            released=tuple(words.get("released", ())),
            splits={name: decode_split(each) for name, each in words.get("splits", {}).items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"the record of command {header.number} has no description that is known here") from error
    if entry.body_checks and entry.body != fingerprint(entry.method, entry.request):
        raise BadRecord(f"the record of command {header.number} is damaged: its request's fingerprint differs")
    return entry


def _flag(flag: int, is_set: bool) -> int:
    return flag if is_set else 0


def _crc(parts: Sequence[bytes | memoryview], seed: int) -> int:
    for part in parts:
        seed = zlib.crc32(part, seed)
    return seed


def uploads_room(uploads: Sequence[StoredUpload]) -> int:
    """Bytes that a record takes for saying what is in these."""
    return len(_to_json(_listed(uploads)).encode()) if uploads else 0


def _description(entry: Entry) -> str:
    if _METHOD.fullmatch(entry.method) and entry.request_id is not None and _UUID.fullmatch(entry.request_id):
        plain = entry.refused is None and entry.commands == 1
        if plain and not (entry.uploads or entry.released or entry.splits):
            # As a rule. Not by json, which takes longer than all else.
            return f'{{"method":"{entry.method}","body":"{entry.body.hex()}","request_id":"{entry.request_id}"}}'
    return _to_json(_describe(entry))


def _describe(entry: Entry) -> dict[str, Any]:
    words: dict[str, Any] = {"method": entry.method, "body": entry.body.hex()}
    if entry.request_id is not None:
        words["request_id"] = entry.request_id
    if entry.commands != 1:
        words["commands"] = entry.commands
    if entry.refused is not None:
        words["refused"] = entry.refused
    if entry.uploads:
        words["uploads"] = _listed(entry.uploads)
    if entry.released:
        words["released"] = entry.released
    if entry.splits:
        words["splits"] = {name: asdict(each) for name, each in entry.splits.items()}
    return words


def _listed(uploads: Sequence[StoredUpload]) -> list[Any]:
    return [[upload.name, upload.file, _rows(upload), (upload.fingerprint or b"").hex()] for upload in uploads]


def _rows(upload: StoredUpload) -> list[tuple[str, tuple[int, ...], int, int]]:
    return [(tensor.dtype, tensor.shape, tensor.offset, tensor.nbytes) for tensor in upload.tensors]


def decode_split(fields: Mapping[str, Any]) -> SplitDecision:
    """The decision whose fields JSON holds. Raises KeyError or TypeError for anything else."""
    written = fields["written"]
    return SplitDecision(**{**fields, "written": None if written is None else tuple(written)})


def _upload(name: str, file: str, rows: Sequence[tuple[str, Sequence[int], int, int]], check: str = "") -> StoredUpload:
    tensors = tuple(StoredTensor(dtype=d, shape=tuple(s), offset=o, nbytes=n) for d, s, o, n in rows)
    return StoredUpload(name=name, file=file, tensors=tensors, fingerprint=bytes.fromhex(check) or None)
