"""What tells one request from another: a short digest of its method and message."""

from __future__ import annotations

import hashlib
from pathlib import Path

import xxhash

_OLD_BYTES = 32
_PIECE_BYTES = 256 << 10


def fingerprint(method: str, raw: bytes | memoryview) -> bytes:
    """16 bytes: XXH3-128, which reads faster than memory gives. It finds mistakes and damage, not forgeries."""
    digest = xxhash.xxh3_128(method.encode())
    digest.update(raw)
    return digest.digest()


def file_fingerprint(path: Path) -> bytes:
    """The same of what is in a file, read piece by piece: of a mapped one, what the disk cannot read ends the process.

    Raises OSError. Blocks.
    """
    digest, buffer = xxhash.xxh3_128(b""), memoryview(bytearray(_PIECE_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.digest()


def fits(known: bytes, body: bytes, method: str, raw: bytes | memoryview) -> bool:
    """Whether `known`, perhaps stored by an older version, is of the request whose fingerprint is `body`."""
    if len(known) == _OLD_BYTES:
        return known == hashlib.sha256(method.encode() + raw).digest()
    return known == body
